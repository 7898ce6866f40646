"""What each step of a pretraining run reads: its batch, the length of its rows and the mixture of sources, which may
change in the middle of a run (`TrainingStage`). All are pure functions of the number of the step.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from arriero.data.batch import Batch
from arriero.data.pretrain_loader import DataStage, PretrainLoader
from arriero.data.shards import Shards
from arriero.distributed.mesh import Mesh
from arriero.errors import ConfigError, did_you_mean
from arriero.train.batches import micro_batches
from arriero.train.config import PretrainConfig


@dataclass(frozen=True)
class Phase:
    """Steps from `first_step` on: what one reads."""

    first_step: int
    first_row: int
    batch_rows: int
    seq_len: int
    weights: Mapping[str, float]

    @property
    def tokens_a_step(self) -> int:
        """Tokens of a global batch, padding included."""
        return self.batch_rows * self.seq_len

    def first_row_of(self, step: int) -> int:
        """The first row of the global batch of one of its steps."""
        return self.first_row + (step - self.first_step) * self.batch_rows


def timetable(config: PretrainConfig, weights: Mapping[str, float], total_steps: int) -> list[Phase]:
    """The phases of a run of `total_steps`; `weights` hold until a stage changes them."""
    phases = [Phase(0, 0, config.loop.batch_rows, config.data.seq_len, weights)]
    for stage in config.stages:
        last, first_step = phases[-1], round(stage.start * total_steps)
        phases.append(
            Phase(
                first_step,
                last.first_row_of(first_step),
                stage.batch_rows or last.batch_rows,
                stage.seq_len or last.seq_len,
                stage.weights or last.weights,
            )
        )
    return phases


def phases_of(config: PretrainConfig, weights: Mapping[str, float], total_steps: int) -> list[Phase]:
    """The timetable without phases that get no step."""
    phases = timetable(config, weights, total_steps)
    return [phase for phase, n in zip(phases, durations(phases, total_steps), strict=True) if n]


def durations(phases: Sequence[Phase], total_steps: int) -> list[int]:
    """Steps of each phase."""
    starts = [*(phase.first_step for phase in phases), total_steps]
    return [end - start for start, end in itertools.pairwise(starts)]


def tokens_of(phases: Sequence[Phase], total_steps: int) -> int:
    """Tokens of a whole run, padding included."""
    steps = durations(phases, total_steps)
    return sum(phase.tokens_a_step * n for phase, n in zip(phases, steps, strict=True))


def count_steps(config: PretrainConfig, held_tokens: int) -> int:
    """Steps that reach `tokens`, or `steps` as given, or `epochs` passes over `held_tokens`."""
    if config.loop.steps and not config.tokens:
        return config.loop.steps
    fine = 1_000_000  # a run of so many steps, for the mean tokens of a step whatever the stages
    mean = tokens_of(timetable(config, {}, fine), fine) / fine
    return max(1, round((config.tokens or config.loop.epochs * held_tokens) / mean))


def mixture(config: PretrainConfig, sources: Mapping[str, Shards]) -> dict[str, float]:
    """Weights by source: as given, else by size. Raises `ConfigError` for a source that is not there."""
    for named in (config.data.weights, config.data.max_epochs, *(stage.weights for stage in config.stages)):
        for name in named:
            if name not in sources:
                raise ConfigError(
                    f"no source {name!r} in {config.data.train}{did_you_mean(name, sources)} "
                    f"(there are: {', '.join(sources)})"
                )
    return config.data.weights or {name: float(shards.n_tokens) for name, shards in sources.items()}


def open_rows(
    config: PretrainConfig, sources: Mapping[str, Shards], phases: Sequence[Phase], total_steps: int
) -> PretrainLoader:
    """The rows of all phases. Raises `ConfigError` where `max_epochs` ends the sources before the run."""
    stages = [DataStage(phase.first_row, phase.seq_len, dict(phase.weights)) for phase in phases]
    loader = PretrainLoader(sources, stages, config.loop.seed, config.data.packing, config.data.max_epochs)
    rows = phases[-1].first_row_of(total_steps)
    if loader.n_rows is not None and loader.n_rows < rows:
        raise ConfigError(
            f"the run reads {rows:,} rows, but max_epochs ends the sources after {loader.n_rows:,}; "
            "raise max_epochs, train for fewer tokens, or add data"
        )
    return loader


def batches_of(
    phases: Sequence[Phase], rows: PretrainLoader, micro_rows: int, mesh: Mesh
) -> Callable[[int], list[Batch]]:
    """This process's micro-batches of each step, of one shape within a phase (see `batch.collate`)."""
    starts = [phase.first_step for phase in phases]

    def batches(step: int) -> list[Batch]:
        phase = phases[bisect.bisect_right(starts, step) - 1]
        first, pad_to = phase.first_row_of(step), micro_rows * phase.seq_len
        return micro_batches(rows, first, phase.batch_rows, micro_rows, mesh, pad_to)

    return batches
