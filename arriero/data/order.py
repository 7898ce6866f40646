"""The order of one source's rows: documents permuted by a stateless permutation, cut into windows, packed into rows.

A source's documents are put in one random order by a stateless permutation and cut into windows of about 131,072
documents. The number of rows that a window fills depends on its documents' lengths alone, so every epoch has equally
many rows; each epoch shuffles the windows, and the rows within each, anew. Row k of a source is then a look-up.

BestFit cuts documents longer than a row into pieces of a row, drops nothing, and packs the pieces (`pack.py`); a
document attends to itself only. Concat lays them end to end and cuts where a row is full, as Llama 1 and 2 did: no
padding, and attention over the whole row.

When the length of rows changes in the middle of an epoch, the remaining text of the current window (of Concat: of the
block) is cut and packed again at the new length: no document is lost or repeated.

Price: a pass over all documents' lengths to count rows (docs/log.md has the seconds); packing a window takes about
0.2 s when its first row is requested, and about 4 MB while it is cached.

S tokens in a row, W documents in a window, k row of the source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arriero.data.batch import Row
from arriero.data.pack import Packing, count_rows, pack, random_order
from arriero.data.shards import Shards

WINDOW = 2**17  # documents; more pack a little better, and take longer to pack
KEPT = 3  # packed windows kept for each source: two where rows are asked for in order, one for looking back
BLOCK = 2**16  # rows of concatenated text that change places with each other
ENDLESS = 2**62

IntArray = NDArray[np.int64]


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

    def number(self, epoch: int, at: int) -> int:
        """The window that is number `at` of the epoch."""
        return int(self.epoch_order(epoch)[at])

    def bounds(self, counts: IntArray, epoch: int) -> IntArray:
        """Where each window of the epoch begins in its order, and where it ends, if window w counts `counts[w]`."""
        return np.concatenate([[0], np.cumsum(counts[self.epoch_order(epoch)])]).astype(np.int64)

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
        """The same inputs in as few pieces as possible: adjacent pieces of a document are merged."""
        order = np.lexsort((self.start, self.document))
        document, start, stop = self.document[order], self.start[order], self.stop[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (document[1:] != document[:-1]) | (start[1:] != stop[:-1])
        last = np.append(first[1:], True)[: len(order)]
        return Pieces(document[first], start[first], stop[last])

    @classmethod
    def concatenated(cls, pieces: Sequence[Pieces]) -> Pieces:
        """All of them, one after another."""
        columns = ([getattr(p, name) for p in pieces] for name in ("document", "start", "stop"))
        return cls(*(np.concatenate(column) for column in columns))

    def take(self, index: IntArray) -> Pieces:
        """These of the pieces."""
        return Pieces(self.document[index], self.start[index], self.stop[index])


class SourceRows(Protocol):
    """The rows of one source from some position in its order on, all of one length."""

    def row(self, k: int) -> Row:
        """Row k, from 0 at the first."""

    def rows_until(self, epochs: Fraction) -> int:
        """Number of rows from the first until `epochs` passes over the source are complete."""

    def epochs(self, n: int) -> float:
        """Number of passes over the source that n rows make."""

    def resized(self, k: int, seq_len: int) -> SourceRows:
        """The same source from row k on, with rows of another length."""

    @property
    def rows_in_epoch(self) -> int:
        """Rows of this length in one pass over the source."""


@dataclass(frozen=True)
class _PackedWindow:
    """One window's pieces in their rows, and where the order goes on after it: window number `after` of `epoch`."""

    pieces: Pieces
    packing: Packing
    epoch: int
    after: int
    times: int = 1  # that the window has been packed: more than once where the rows' length changed in it


class BestFit:
    """Rows of whole documents and of pieces of long ones, packed window by window."""

    def __init__(
        self, windows: Windows, seq_len: int, epoch: int = 0, at: int = 0, head: _PackedWindow | None = None
    ) -> None:
        """Begins with the rows of `head`, if any, and continues with window number `at` of `epoch`."""
        self.windows, self.seq_len = windows, seq_len
        self._counts = np.array([count_rows(windows.lengths(w) - 1, seq_len) for w in range(windows.n)])
        self.rows_in_epoch = int(self._counts.sum())
        self._bounds = lru_cache(maxsize=2)(partial(windows.bounds, self._counts))  # in rows
        self._packed = lru_cache(maxsize=KEPT)(self._pack_window)
        self._head, self._n_head = head, len(head.packing) if head else 0
        self._base = epoch * self.rows_in_epoch + int(self._bounds(epoch)[at])

    def row(self, k: int) -> Row:
        """Row k, from 0 at the first."""
        return self._read(self.pieces(k))

    def pieces(self, k: int) -> Pieces:
        """What row k is made of."""
        packed, r = self._find(k)
        return packed.pieces.take(packed.packing.row(r))

    def rows_until(self, epochs: Fraction) -> int:
        """Number of rows from the first until `epochs` passes over the source are complete."""
        return max(0, math.floor(epochs * self.rows_in_epoch) - self._base + self._n_head)

    def epochs(self, n: int) -> float:
        """Number of passes over the source that n rows make."""
        return n / self.rows_in_epoch

    def resized(self, k: int, seq_len: int) -> BestFit:
        """The same source from row k on, with rows of another length."""
        packed, r = self._find(k)
        if r == 0 and packed.times == 1:  # nothing of the window has been given out
            return BestFit(self.windows, seq_len, packed.epoch, packed.after - 1)
        rest = packed.pieces.take(packed.packing.examples[packed.packing.bounds[r] :]).joined().cut(seq_len)
        key = self.windows.key(self.windows.number(packed.epoch, packed.after - 1)) + packed.times
        packing = pack(rest.stop - rest.start, seq_len, key, packed.epoch)
        head = _PackedWindow(rest, packing, packed.epoch, packed.after, packed.times + 1)
        return BestFit(self.windows, seq_len, packed.epoch, packed.after, head)

    def _find(self, k: int) -> tuple[_PackedWindow, int]:
        """The packed window that holds row k, and the row's index in it."""
        if self._head is not None and k < self._n_head:
            return self._head, k
        epoch, r = divmod(self._base + k - self._n_head, self.rows_in_epoch)
        bounds = self._bounds(epoch)
        at = int(np.searchsorted(bounds, r, side="right")) - 1
        return self._packed(epoch, at), r - int(bounds[at])

    def _pack_window(self, epoch: int, at: int) -> _PackedWindow:
        w = self.windows.number(epoch, at)
        documents = self.windows.documents(w)
        inputs = self.windows.shards.lengths_of(documents) - 1
        pieces = Pieces(documents, np.zeros_like(inputs), inputs).cut(self.seq_len)
        packing = pack(pieces.stop - pieces.start, self.seq_len, self.windows.key(w), epoch)
        assert len(packing) == self._counts[w]
        return _PackedWindow(pieces, packing, epoch, at + 1)

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

    Neighbouring rows are often one document's, so the rows of a window are shuffled, in blocks of at most BLOCK; a
    row across a window's end keeps its place.

    spans: the intervals of that endless text that the rows are cut from, the last without end. There are several where
    rows of another length have used a part of a block.
    """

    def __init__(self, windows: Windows, seq_len: int, spans: Sequence[tuple[int, int]] = ((0, ENDLESS),)) -> None:
        self.windows, self.seq_len = windows, seq_len
        self.n_tokens = windows.shards.n_tokens
        self._starts, self._stops = np.array(spans, dtype=np.int64).T
        self._ends = np.cumsum(self._stops - self._starts)  # of each span, counted in tokens of the run
        self._endless = int(self._ends[-2]) if len(spans) > 1 else 0  # where the last span begins, counted so
        self._given = int(self._starts[-1]) - self._endless  # tokens, by the runs before
        counts = np.array([windows.lengths(w).sum() for w in range(windows.n)])
        self._bounds = lru_cache(maxsize=2)(partial(windows.bounds, counts))  # in tokens
        self._laid_out = lru_cache(maxsize=KEPT)(self._lay_out)
        self._order = lru_cache(maxsize=KEPT)(self._random_order)

    @property
    def rows_in_epoch(self) -> int:
        """Whole rows that go through the source once; what is left of it begins the next row."""
        return self.n_tokens // self.seq_len

    def row(self, k: int) -> Row:
        """Row k: each of its tokens predicts the one after it in the text."""
        first, order = self._block(k)
        at = (first + int(order[k - first])) * self.seq_len
        ids = [self._text(start, stop + 1) for start, stop in self._spans(at, at + self.seq_len)]
        tokens, targets = np.concatenate([x[:-1] for x in ids]), np.concatenate([x[1:] for x in ids])
        return Row(tokens.astype(np.int32), targets, np.array([self.seq_len]))

    def rows_until(self, epochs: Fraction) -> int:
        """Number of rows from the first until `epochs` passes over the source are complete."""
        return max(0, (math.floor(epochs * self.n_tokens) - self._given) // self.seq_len)

    def epochs(self, n: int) -> float:
        """Number of passes over the source that n rows make."""
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
        """The intervals of the endless text that tokens `at` to `end` are from."""
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

    def _lay_out(self, epoch: int, at: int) -> tuple[IntArray, IntArray]:
        """The documents of a window in the epoch's order, and where each begins in it."""
        w = self.windows.number(epoch, at)
        documents = self.windows.documents(w)
        documents = documents[random_order(len(documents), self.windows.key(w), epoch)]
        lengths = self.windows.shards.lengths_of(documents)
        return documents, np.cumsum(lengths) - lengths
