"""Rows to pretrain on: documents of several sources, mixed and packed, in a pure function of (seed, index).

`PretrainLoader.row(index)` gives the same row to whoever asks, at any time, on any number of processes: there is no
state but a count, so resume is "go on from index", with any batch size. From index to tokens:

    index --mixture--> source, k --epochs and windows--> row r of window w --packing--> pieces of documents

1. The mixture (`mix.py`) says which source row `index` is from and how many of its rows came before, k.
2. The source's own order (`order.py`) says which window of its documents row k is in, packs that window, and reads the
   row's pieces from the shards.

What a row holds are predictions: a document of n tokens is n - 1 inputs, each with the next token as its target, so a
position never goes to waste on an end of text that predicts nothing; the end of text itself is predicted. A piece that
is not its document's last still predicts the token after it.

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
from arriero.data.mix import Schedule, integer_weights
from arriero.data.order import WINDOW, BestFit, Concat, Run, Windows
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
        integer_weights(stage.weights)
        if stage.seq_len < 1:
            raise ConfigError(f"seq_len is {stage.seq_len}; a row holds 1 token at least")
    for name, shards in sources.items():
        if shards.n_predicted == 0:
            raise DataError(f"{shards.directory}: source {name!r} has no documents to learn from; leave it out")
