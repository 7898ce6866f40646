"""Pretraining rows: documents of several sources, mixed and packed, as a pure function of (seed, index).

`PretrainLoader.row(index)` returns the same row at any time and on any number of processes. The only state is the index
of the next row, so a run can resume with any batch size. From index to tokens:

    index --mixture--> source, k --epochs and windows--> row r of window w --packing--> pieces of documents

1. The mixture (`mix.py`) says which source row `index` is from and how many of its rows came before, k.
2. The source's own order (`order.py`) says which window of its documents row k is in, packs that window, and reads the
   row's pieces from the shards.

A row holds inputs with their targets: a document of n tokens gives n - 1 inputs, each with the next token as target.
So the end-of-text token is a target but takes no input position, where it would predict nothing. A piece of a document
that is not its last still predicts the token after it.

A stage may change the mixture and the length of rows at any row, also in the middle of an epoch, as Llama 3's did
(arXiv 2407.21783, section 3.4).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from arriero.data.batch import Batch, Row, collate
from arriero.data.mix import MixtureOrder, integer_weights
from arriero.data.order import WINDOW, BestFit, Concat, SourceRows, Windows
from arriero.data.shards import Shards
from arriero.errors import ConfigError, DataError, did_you_mean

PackingKind = Literal["best-fit", "concat"]


@dataclass(frozen=True)
class DataStage:
    """From row `first_row` on, rows have `seq_len` tokens and come from the sources by these weights.

    weights: by source, in any unit; a source that is not named or has weight 0 gives nothing.
    """

    first_row: int
    seq_len: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class _Phase:
    """Rows from `first_row` on, up to where the stage changes or a source is used up.

    mixture: of the sources that have rows left. rows: of each source, from where the length of rows last changed.
    """

    first_row: int
    seq_len: int
    mixture: MixtureOrder
    rows: Mapping[str, SourceRows]
    used: Mapping[str, int]  # of each source's rows, those before this phase

    def used_at(self, index: int) -> dict[str, int]:
        """Of each source's rows, those before row `index`."""
        n = index - self.first_row
        active = self.mixture.names
        return {name: k + (self.mixture.count(name, n) if name in active else 0) for name, k in self.used.items()}

    def next_row(self, limits: Mapping[str, int], end: int | None) -> int | None:
        """The row after this phase: the stage's `end`, or the one at which a source first reaches its limit, if any."""
        limited = [name for name in self.mixture.names if name in limits]
        ends = [self.first_row + self.mixture.position(n, limits[n] - self.used[n] - 1) + 1 for n in limited]
        return min([*ends, *([] if end is None else [end])], default=None)


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
        self._used_up: set[str] = set()
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
        return self._phases[0].rows[source].rows_in_epoch

    def epochs(self, n_rows: int) -> dict[str, float]:
        """How often the first n_rows go through each source."""
        done = dict.fromkeys(self.sources, 0.0)
        for phase, end in zip(self._phases, [*self._firsts[1:], n_rows], strict=True):
            if phase.first_row < n_rows:
                after = phase.used_at(min(end, n_rows))
                for name, run in phase.rows.items():
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

    def _locate(self, index: int) -> tuple[str, SourceRows, int]:
        phase = self._phase(index)
        n = index - phase.first_row
        name = phase.mixture.source(n)
        return name, phase.rows[name], phase.used[name] + phase.mixture.count(name, n)

    def _plan(self, bounds: Mapping[str, Fraction]) -> None:
        """Divide all rows into phases; sets `n_rows` where the sources are used up."""
        make = BestFit if self.packing == "best-fit" else Concat
        ends = [*(stage.first_row for stage in self.stages[1:]), None]
        rows: dict[str, SourceRows] = {name: make(w, self.stages[0].seq_len) for name, w in self._windows.items()}
        used = dict.fromkeys(rows, 0)
        at, seq_len = 0, self.stages[0].seq_len
        for stage, end in zip(self.stages, ends, strict=True):
            if stage.seq_len != seq_len:
                rows = {name: source.resized(used[name], stage.seq_len) for name, source in rows.items()}
                used, seq_len = dict.fromkeys(rows, 0), stage.seq_len
            limits = {name: rows[name].rows_until(bound) for name, bound in bounds.items()}
            while end is None or at < end:
                active = self._active(stage, used, limits)
                if not active:
                    self.n_rows = at
                    return
                phase = _Phase(at, seq_len, MixtureOrder(active), rows, used)
                self._phases.append(phase)
                following = phase.next_row(limits, end)
                if following is None:
                    return
                at, used = following, phase.used_at(following)

    def _active(self, stage: DataStage, used: Mapping[str, int], limits: Mapping[str, int]) -> dict[str, float]:
        """The weights of the stage's sources that have rows left; what was used up once stays so in later stages."""
        self._used_up |= {name for name, limit in limits.items() if used[name] >= limit}
        return {name: w for name, w in stage.weights.items() if w > 0 and name not in self._used_up}


def _check(sources: Mapping[str, Shards], stages: Sequence[DataStage], bounds: Mapping[str, Fraction]) -> None:
    if not stages or stages[0].first_row != 0:
        raise ConfigError("the first stage must begin at row 0")
    for before, after in itertools.pairwise(stages):
        if after.first_row <= before.first_row:
            raise ConfigError(
                f"a stage begins at row {after.first_row:,}, the one before it at {before.first_row:,}; "
                "give stages in their order, each of one row at least"
            )
    _check_sources(sources, stages, bounds)
    for stage in stages:
        integer_weights(stage.weights)
        if stage.seq_len < 1:
            raise ConfigError(f"seq_len is {stage.seq_len}; a row holds 1 token at least")


def _check_sources(sources: Mapping[str, Shards], stages: Sequence[DataStage], bounds: Mapping[str, Fraction]) -> None:
    for named in (bounds, *(stage.weights for stage in stages)):
        for name in named:
            if name not in sources:
                raise ConfigError(f"no source {name!r}{did_you_mean(name, sources)} (there are: {', '.join(sources)})")
    for name, epochs in bounds.items():
        if epochs <= 0:
            raise ConfigError(f"max_epochs of {name!r} is {float(epochs)}; give a number above 0")
    for name, shards in sources.items():
        if shards.n_predicted == 0:
            raise DataError(f"{shards.directory}: source {name!r} has no documents to learn from; leave it out")
