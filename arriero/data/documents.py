"""Rows to pretrain on: documents of several sources, mixed and packed, in a pure function of (seed, index).

`PretrainLoader.row(index)` gives the same row to whoever asks, at any time, on any number of processes: there is no
state but a count, so resume is "go on from index", with any batch size. From index to tokens:

    index --mixture--> source, k --epochs and windows--> row r of window w --packing--> pieces of documents

1. The mixture (`mix.py`) says which source row `index` is from and how many of its rows came before, k.
2. A source's documents are laid out in one random order by a stateless permutation and cut into windows of about
   131,072 documents. How many rows a window fills depends on its lengths alone, so each epoch has equally many; an
   epoch orders the windows, and the rows in each, anew.
3. In a window the documents are packed. "best-fit" cuts those longer than a row into pieces of a row, drops nothing,
   and packs the pieces (`pack.py`); a document attends to itself only. "concat" lays them end to end and cuts where a
   row is full, as Llama 1 and 2 did: no padding, and attention over the whole row. The rows then change places, or a
   small batch would be of one document.

What a row holds are predictions: a document of n tokens is n - 1 inputs, each with the next token as its target, so a
position never goes to waste on an end of text that predicts nothing; the end of text itself is predicted. A piece that
is not its document's last still predicts the token after it.

When a stage changes the length of rows in the middle of an epoch, what the current window has not yet given out is
joined, cut and packed again at the new length: no document is lost or repeated. Llama 3's stages (arXiv 2407.21783,
section 3.4) are such.

Price: one look at every document's length when a loader is made, to count rows (docs/log.md has the seconds); packing a
window, about 0.2 s, when its first row is asked for, and about 4 MB while it is kept.

S tokens in a row, W documents in a window, k row of one source.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from arriero.data.loader import Batch, Row, collate
from arriero.data.mix import Schedule
from arriero.data.pack import Packing, count_rows, pack, random_order
from arriero.data.shards import Shards
from arriero.errors import ConfigError, DataError, did_you_mean

WINDOW = 2**17  # documents; more pack a little better, and take longer to pack
KEPT = 3  # packed windows kept for each source: two where rows are asked for in order, one for looking back
BLOCK = 2**16  # rows of concatenated text that change places with each other
ENDLESS = 2**62

IntArray = NDArray[np.int64]
PackingKind = Literal["best-fit", "concat"]


@dataclass(frozen=True)
class DataStage:
    """From row `first_row` on, rows have `seq_len` tokens and come from the sources by these weights.

    weights: by source, in any unit; a source that is not named or has weight 0 gives nothing.
    """

    first_row: int
    seq_len: int
    weights: Mapping[str, float]


# One source: its documents in order, in windows


def permuted(indices: IntArray, n: int, key: int) -> IntArray:
    """Where a random permutation of n, chosen by `key`, sends each of `indices`: a Feistel network on n's bits.

    Places from n to the next power of two are walked through until the walk comes back below n. Six half-rounds with
    splitmix64's finaliser; exact in 64-bit integers, so equal on every machine, and nothing of size n is held.
    """
    bits = max(2, (n - 1).bit_length())
    low = bits // 2
    masks = (np.uint64(2**low - 1), np.uint64(2 ** (bits - low) - 1))
    keys = np.random.PCG64(key).random_raw(6)
    out = indices.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        x = out[outside]
        left, right = x >> np.uint64(low), x & masks[0]
        for round_ in range(3):
            right ^= _scrambled(left + keys[2 * round_]) & masks[0]
            left ^= _scrambled(right + keys[2 * round_ + 1]) & masks[1]
        out[outside] = left << np.uint64(low) | right
        outside = out >= n
    return out.astype(np.int64)


def _scrambled(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Windows:
    """The documents of one source in random order, cut into windows of equal size; one order for each (seed, name)."""

    def __init__(self, shards: Shards, name: str, seed: int, size: int = WINDOW) -> None:
        self.shards = shards
        self._key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
        self.n = max(1, -(-shards.n_documents // size))
        self._bounds = [i * shards.n_documents // self.n for i in range(self.n + 1)]
        self.epoch_order = lru_cache(maxsize=2)(self._epoch_order)

    def documents(self, w: int) -> IntArray:
        """The documents of window w."""
        return permuted(np.arange(self._bounds[w], self._bounds[w + 1]), self.shards.n_documents, self._key)

    def lengths(self, w: int) -> IntArray:
        """Tokens of each document of window w."""
        return self.shards.lengths_of(self.documents(w))

    def key(self, w: int) -> int:
        """A seed for what happens within window w."""
        return (self._key + 0x9E3779B97F4A7C15 * (w + 1)) % 2**64

    def _epoch_order(self, epoch: int) -> IntArray:
        return random_order(self.n, self._key, epoch, 3)


@dataclass(frozen=True)
class Pieces:
    """Inputs start[i] to stop[i] of document[i], each predicting the token after it."""

    document: IntArray
    start: IntArray
    stop: IntArray

    def cut(self, seq_len: int) -> Pieces:
        """The same, none longer than `seq_len`."""
        each = -(-(self.stop - self.start) // seq_len)
        first = np.repeat(np.cumsum(each) - each, each)
        start = np.repeat(self.start, each) + (np.arange(len(first)) - first) * seq_len
        return Pieces(np.repeat(self.document, each), start, np.minimum(start + seq_len, np.repeat(self.stop, each)))

    def joined(self) -> Pieces:
        """The same inputs in as few pieces as can be: what lies side by side in a document becomes one."""
        order = np.lexsort((self.start, self.document))
        document, start, stop = self.document[order], self.start[order], self.stop[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (document[1:] != document[:-1]) | (start[1:] != stop[:-1])
        last = np.append(first[1:], True)[: len(order)]
        return Pieces(document[first], start[first], stop[last])

    def take(self, index: IntArray) -> Pieces:
        """These of the pieces."""
        return Pieces(self.document[index], self.start[index], self.stop[index])


class Run(Protocol):
    """The rows of one source from somewhere in its order on, all of one length."""

    def row(self, k: int) -> Row:
        """Row k of the run."""

    def rows_until(self, epochs: Fraction) -> int:
        """Rows from the run's first to where the source has been gone through so many times."""

    def epochs(self, n: int) -> float:
        """How often n rows go through the source."""

    def resized(self, k: int, seq_len: int) -> Run:
        """The run that goes on at row k with rows of another length."""

    @property
    def rows_in_epoch(self) -> int:
        """Rows of this length that go through the source once."""


@dataclass(frozen=True)
class _Packed:
    """One window's pieces in their rows, and where the order goes on after it: window number `after` of `epoch`."""

    pieces: Pieces
    packing: Packing
    epoch: int
    after: int
    times: int = 1  # that the window has been packed: more than once where the rows' length changed in it


class BestFit:
    """Rows of whole documents and of pieces of long ones, packed window by window."""

    def __init__(
        self, windows: Windows, seq_len: int, epoch: int = 0, at: int = 0, head: _Packed | None = None
    ) -> None:
        """A run that begins with the rows of `head`, if any, and goes on with window number `at` of `epoch`."""
        self.windows, self.seq_len = windows, seq_len
        self._counts = np.array([count_rows(windows.lengths(w) - 1, seq_len) for w in range(windows.n)])
        self.rows_in_epoch = int(self._counts.sum())
        self._bounds = lru_cache(maxsize=2)(self._epoch_bounds)
        self._packed = lru_cache(maxsize=KEPT)(self._pack_window)
        self._head, self._n_head = head, len(head.packing) if head else 0
        self._base = epoch * self.rows_in_epoch + int(self._bounds(epoch)[at])

    def row(self, k: int) -> Row:
        """Row k of the run."""
        packed, r = self._find(k)
        return self._read(packed.pieces.take(packed.packing.row(r)))

    def rows_until(self, epochs: Fraction) -> int:
        """Rows from the run's first to where the source has been gone through so many times."""
        return max(0, math.floor(epochs * self.rows_in_epoch) - self._base + self._n_head)

    def epochs(self, n: int) -> float:
        """How often n rows go through the source."""
        return n / self.rows_in_epoch

    def resized(self, k: int, seq_len: int) -> BestFit:
        """The run that goes on at row k with rows of another length."""
        packed, r = self._find(k)
        if r == 0 and packed.times == 1:  # nothing of the window has been given out
            return BestFit(self.windows, seq_len, packed.epoch, packed.after - 1)
        rest = packed.pieces.take(packed.packing.examples[packed.packing.bounds[r] :]).joined().cut(seq_len)
        key = self.windows.key(self._window(packed.epoch, packed.after - 1)) + packed.times
        packing = pack(rest.stop - rest.start, seq_len, key, packed.epoch)
        head = _Packed(rest, packing, packed.epoch, packed.after, packed.times + 1)
        return BestFit(self.windows, seq_len, packed.epoch, packed.after, head)

    def _find(self, k: int) -> tuple[_Packed, int]:
        """The packed window that row k lies in, and which of its rows it is."""
        if self._head is not None and k < self._n_head:
            return self._head, k
        epoch, r = divmod(self._base + k - self._n_head, self.rows_in_epoch)
        bounds = self._bounds(epoch)
        at = int(np.searchsorted(bounds, r, side="right")) - 1
        return self._packed(epoch, at), r - int(bounds[at])

    def _window(self, epoch: int, at: int) -> int:
        return int(self.windows.epoch_order(epoch)[at])

    def _epoch_bounds(self, epoch: int) -> IntArray:
        """First row of each window of the epoch in its order, and the epoch's number of rows."""
        return np.concatenate([[0], np.cumsum(self._counts[self.windows.epoch_order(epoch)])]).astype(np.int64)

    def _pack_window(self, epoch: int, at: int) -> _Packed:
        w = self._window(epoch, at)
        documents = self.windows.documents(w)
        inputs = self.windows.shards.lengths_of(documents) - 1
        pieces = Pieces(documents, np.zeros_like(inputs), inputs).cut(self.seq_len)
        packing = pack(pieces.stop - pieces.start, self.seq_len, self.windows.key(w), epoch)
        assert len(packing) == self._counts[w]
        return _Packed(pieces, packing, epoch, at + 1)

    def _read(self, pieces: Pieces) -> Row:
        n = pieces.stop - pieces.start
        tokens, targets = np.empty(n.sum(), dtype=np.int32), np.empty(n.sum(), dtype=np.int64)
        at = 0
        for document, start, stop in zip(
            *(x.tolist() for x in (pieces.document, pieces.start, pieces.stop)), strict=True
        ):
            ids = self.windows.shards.tokens(document, start, stop + 1)
            tokens[at : at + stop - start] = ids[:-1]
            targets[at : at + stop - start] = ids[1:]
            at += stop - start
        return Row(tokens, targets, n)


class Concat:
    """Rows cut from the documents laid end to end, epoch after epoch, in random order.

    Neighbouring rows are often one document's, so the rows of a window change places, in blocks of at most BLOCK; a
    row over a window's end keeps its own.

    spans: the stretches of that endless text that the run gives, the last without end. There are several where rows of
    another length gave a block in part.
    """

    def __init__(self, windows: Windows, seq_len: int, spans: Sequence[tuple[int, int]] = ((0, ENDLESS),)) -> None:
        self.windows, self.seq_len = windows, seq_len
        self.n_tokens = windows.shards.n_tokens
        self._starts, self._stops = np.array(spans, dtype=np.int64).T
        self._ends = np.cumsum(self._stops - self._starts)  # of each span, counted in tokens of the run
        self._endless = int(self._ends[-2]) if len(spans) > 1 else 0  # where the last span begins, counted so
        self._given = int(self._starts[-1]) - self._endless  # tokens, by the runs before
        self._counts = np.array([windows.lengths(w).sum() for w in range(windows.n)])
        self._bounds = lru_cache(maxsize=2)(self._epoch_bounds)
        self._laid_out = lru_cache(maxsize=KEPT)(self._lay_out)
        self._order = lru_cache(maxsize=KEPT)(self._random_order)

    @property
    def rows_in_epoch(self) -> int:
        """Whole rows that go through the source once; what is left of it begins the next row."""
        return self.n_tokens // self.seq_len

    def row(self, k: int) -> Row:
        """Row k of the run: each of its tokens predicts the one after it in the text."""
        first, order = self._block(k)
        at = (first + int(order[k - first])) * self.seq_len
        ids = [self._text(start, stop + 1) for start, stop in self._spans(at, at + self.seq_len)]
        tokens, targets = np.concatenate([x[:-1] for x in ids]), np.concatenate([x[1:] for x in ids])
        return Row(tokens.astype(np.int32), targets, np.array([self.seq_len]))

    def rows_until(self, epochs: Fraction) -> int:
        """Rows from the run's first to where the source has been gone through so many times."""
        return max(0, (math.floor(epochs * self.n_tokens) - self._given) // self.seq_len)

    def epochs(self, n: int) -> float:
        """How often n rows go through the source."""
        return n * self.seq_len / self.n_tokens

    def resized(self, k: int, seq_len: int) -> Concat:
        """The run that goes on at row k with rows of another length: what is left of its block, then what follows."""
        first, order = self._block(k)
        left = [(row * self.seq_len, (row + 1) * self.seq_len) for row in np.sort(first + order[k - first :]).tolist()]
        left.append(((first + len(order)) * self.seq_len, int(self._ends[-1])))
        joined: list[tuple[int, int]] = []
        for start, stop in (span for part in left for span in self._spans(*part)):
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        return Concat(self.windows, seq_len, joined)

    def _block(self, k: int) -> tuple[int, IntArray]:
        """The first of the rows among which row k changes places, and their order."""
        at, epoch = k * self.seq_len, -1
        begin, end = 0, self._endless
        if at >= self._endless:
            epoch = (at + self._given) // self.n_tokens
            bounds = self._bounds(epoch) + epoch * self.n_tokens - self._given
            window = int(np.searchsorted(bounds, at, side="right"))
            begin, end = (max(self._endless, int(bounds[i])) for i in (window - 1, window))
        first, stop = -(-begin // self.seq_len), end // self.seq_len
        if not first <= k < stop:
            return k, np.zeros(1, dtype=np.int64)
        first += (k - first) // BLOCK * BLOCK
        return first, self._order(min(BLOCK, stop - first), epoch + 1, first)

    def _random_order(self, n: int, *key: int) -> IntArray:
        return random_order(n, self.windows.key(0), *key)

    def _spans(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        """Where tokens `at` to `end` of the run lie in the endless text."""
        i = int(np.searchsorted(self._ends, at, side="right"))
        while at < end:
            start = int(self._stops[i] - self._ends[i]) + at
            stop = min(int(self._stops[i]), start + end - at)
            yield start, stop
            at, i = at + stop - start, i + 1

    def _text(self, start: int, stop: int) -> IntArray:
        """Tokens `start` to `stop` of the endless text."""
        ids = np.empty(stop - start, dtype=np.int64)
        at = 0
        while at < len(ids):
            part = self._from(start + at, len(ids) - at)
            ids[at : at + len(part)] = part
            at += len(part)
        return ids

    def _from(self, place: int, n: int) -> NDArray[np.generic]:
        """Up to n tokens from `place` in the endless text on, to the end of a document."""
        epoch, t = divmod(place, self.n_tokens)
        bounds = self._bounds(epoch)
        at = int(np.searchsorted(bounds, t, side="right")) - 1
        documents, starts = self._laid_out(epoch, at)
        t -= int(bounds[at])
        i = int(np.searchsorted(starts, t, side="right")) - 1
        start = t - int(starts[i])
        return self.windows.shards.tokens(int(documents[i]), start, start + n)

    def _epoch_bounds(self, epoch: int) -> IntArray:
        return np.concatenate([[0], np.cumsum(self._counts[self.windows.epoch_order(epoch)])]).astype(np.int64)

    def _lay_out(self, epoch: int, at: int) -> tuple[IntArray, IntArray]:
        """The documents of a window in the epoch's order, and where each begins in it."""
        w = int(self.windows.epoch_order(epoch)[at])
        documents = self.windows.documents(w)
        documents = documents[random_order(len(documents), self.windows.key(w), epoch)]
        lengths = self.windows.shards.lengths_of(documents)
        return documents, np.cumsum(lengths) - lengths


# All sources


@dataclass(frozen=True)
class _Phase:
    """Rows from `first_row` on, while neither the stage nor the set of sources that have rows left changes."""

    first_row: int
    seq_len: int
    schedule: Schedule
    runs: Mapping[str, Run]
    used: Mapping[str, int]  # rows of each run before this phase

    def used_at(self, index: int) -> dict[str, int]:
        """Rows of each run before row `index`."""
        n = index - self.first_row
        active = self.schedule.names
        return {name: k + (self.schedule.count(name, n) if name in active else 0) for name, k in self.used.items()}


class PretrainLoader:
    """Rows of several sources; see the module. `n_rows` is how many there are, None where they never end.

    max_epochs: how often each source may be gone through; 0.64 means that 36% of it is never seen. A source that is
    used up gives way: the others go on in their proportions. One that is not named has no bound.
    Raises ConfigError for stages and names that make no sense, DataError for a source without documents.
    """

    def __init__(
        self,
        sources: Mapping[str, Shards],
        stages: Sequence[DataStage],
        seed: int,
        packing: PackingKind = "best-fit",
        max_epochs: Mapping[str, float] | None = None,
        window: int = WINDOW,
    ) -> None:
        self.sources, self.stages, self.seed, self.packing = sources, tuple(stages), seed, packing
        bounds = {name: Fraction(str(epochs)) for name, epochs in (max_epochs or {}).items()}
        _check(sources, self.stages, bounds)
        self._windows = {name: Windows(shards, name, seed, window) for name, shards in sources.items()}
        self._phases: list[_Phase] = []
        self.n_rows: int | None = None
        self._plan(bounds)
        if not self._phases:
            given = ", ".join(f"{name}: {float(epochs)}" for name, epochs in bounds.items())
            raise ConfigError(f"max_epochs ({given}) leaves not one row of {self.stages[0].seq_len:,} tokens; raise it")
        self._firsts = [phase.first_row for phase in self._phases]

    def row(self, index: int) -> Row:
        """Row `index`: a pure function of (sources, stages, seed, packing, max_epochs, index)."""
        _, run, k = self._locate(index)
        return run.row(k)

    def source(self, index: int) -> str:
        """The source of row `index`."""
        return self._locate(index)[0]

    def seq_len(self, index: int) -> int:
        """The most tokens that row `index` may have."""
        return self._phase(index).seq_len

    def rows_in_epoch(self, source: str) -> int:
        """Rows of the first stage's length that go through a source once."""
        return self._phases[0].runs[source].rows_in_epoch

    def epochs(self, n_rows: int) -> dict[str, float]:
        """How often the first n_rows go through each source."""
        done = dict.fromkeys(self.sources, 0.0)
        for phase, end in zip(self._phases, [*self._firsts[1:], n_rows], strict=True):
            if phase.first_row < n_rows:
                after = phase.used_at(min(end, n_rows))
                for name, run in phase.runs.items():
                    done[name] += run.epochs(after[name] - phase.used[name])
        return done

    def collate(self, rows: Sequence[Row], pad_to: int | None = None) -> Batch:
        """Lay rows end to end; pad_to: tokens, an untrained document fills up to it."""
        return collate(rows, pad_to)

    def _phase(self, index: int) -> _Phase:
        assert index >= 0
        if self.n_rows is not None and index >= self.n_rows:
            raise DataError(
                f"row {index:,} does not exist: the sources are used up after {self.n_rows:,} rows; "
                "raise max_epochs, train for fewer steps, or add data"
            )
        return self._phases[bisect_right(self._firsts, index) - 1]

    def _locate(self, index: int) -> tuple[str, Run, int]:
        phase = self._phase(index)
        n = index - phase.first_row
        name = phase.schedule.source(n)
        return name, phase.runs[name], phase.used[name] + phase.schedule.count(name, n)

    def _plan(self, bounds: Mapping[str, Fraction]) -> None:
        """Cut the line of rows into phases: where a stage begins, and where a source is used up."""
        make = BestFit if self.packing == "best-fit" else Concat
        ends = [*(stage.first_row for stage in self.stages[1:]), None]
        used_up: set[str] = set()
        at = 0
        for stage, end in zip(self.stages, ends, strict=True):
            if not self._phases:
                runs: dict[str, Run] = {name: make(w, stage.seq_len) for name, w in self._windows.items()}
                used = dict.fromkeys(runs, 0)
            elif stage.seq_len != self._phases[-1].seq_len:
                runs = {name: run.resized(used[name], stage.seq_len) for name, run in runs.items()}
                used = dict.fromkeys(runs, 0)
            limits = {name: runs[name].rows_until(bound) for name, bound in bounds.items()}
            while end is None or at < end:
                used_up |= {name for name, limit in limits.items() if used[name] >= limit}
                active = {name: w for name, w in stage.weights.items() if w > 0 and name not in used_up}
                if not active:
                    self.n_rows = at
                    return
                schedule = Schedule(active)
                self._phases.append(_Phase(at, stage.seq_len, schedule, runs, used))
                stops = [at + schedule.position(n, limits[n] - used[n] - 1) + 1 for n in active if n in limits]
                stops += [] if end is None else [end]
                if not stops:
                    return
                at = min(stops)
                used = self._phases[-1].used_at(at)


def _check(sources: Mapping[str, Shards], stages: Sequence[DataStage], bounds: Mapping[str, Fraction]) -> None:
    if not stages or stages[0].first_row != 0:
        raise ConfigError("the first stage must begin at row 0")
    for before, after in itertools.pairwise(stages):
        if after.first_row <= before.first_row:
            raise ConfigError(
                f"a stage begins at row {after.first_row:,}, the one before it at {before.first_row:,}; "
                "give stages in their order, each of one row at least"
            )
    for named in (bounds, *(stage.weights for stage in stages)):
        for name in named:
            if name not in sources:
                raise ConfigError(f"no source {name!r}{did_you_mean(name, sources)} (there are: {', '.join(sources)})")
    for name, epochs in bounds.items():
        if epochs <= 0:
            raise ConfigError(f"max_epochs of {name!r} is {float(epochs)}; give a number above 0")
    for stage in stages:
        if stage.seq_len < 1:
            raise ConfigError(f"seq_len is {stage.seq_len}; a row holds 1 token at least")
    for name, shards in sources.items():
        if shards.n_predicted == 0:
            raise DataError(f"{shards.directory}: source {name!r} has no documents to learn from; leave it out")
