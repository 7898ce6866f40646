"""From settings to files: what all recipes do around the loop.

A recipe is a configuration and a `build` that loads, tokenises and wraps: everything up to step 1, so that all that can
be refused is refused before it. The run directory is a complete record (layout in train/report.py) and is resumed,
trained in and reported on here, once for all recipes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console

from arriero import settings
from arriero.checkpoint import native
from arriero.checkpoint.load import best_device
from arriero.distributed.mesh import Mesh, init_mesh
from arriero.errors import ConfigError
from arriero.io.files import write_json, write_text
from arriero.optim.schedule import warmup_steps
from arriero.show.terminal import notes
from arriero.train import attempts
from arriero.train.claim import check_named, claimed, refuse_changed
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.environment import describe
from arriero.train.loop import Outcome, Trainer
from arriero.train.metrics import MetricsLog, NoLog, require_trackers
from arriero.train.report import write_report

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMPILE_FROM = 300_000  # tokens of a run above which compiling (half a minute to a minute) pays on two cores


class Run(Protocol):
    """Everything a run is made of, ready for step 1."""

    @property
    def trainer(self) -> Trainer:
        """Model, optimizer and progress."""

    @property
    def total_tokens(self) -> int:
        """Tokens through the model over the whole run, padding included."""

    def summary(self) -> str:
        """What is about to happen, in a few lines."""

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what is learned from and validated on, each under what it is: a run that goes on needs the same."""

    def data_statistics(self) -> dict[str, Any]:
        """What is learned from, and how much. For data.json."""

    def sample(self, when: Literal["before", "after"]) -> None:
        """Write what the model says before step 1, and what after the last, to samples.jsonl; on every process."""

    def export(self) -> Path:
        """Write the trained adapter or model; returns its directory; on every process."""


Build = Callable[[Any, Console, Mesh], Run]


def execute(config: Any, recipe: str, build: Build) -> Outcome:
    """Run a recipe as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    began = time.time()
    check_named(config, recipe)
    require_trackers(config.loop.trackers)
    if config.parallel.cpu_offload and best_device() == "cpu":
        raise ConfigError("cpu_offload is on, but there is no GPU here: all lies in the host's memory; leave it out")
    with init_mesh(config.parallel, best_device()) as mesh, claimed(config, recipe, mesh) as recorded:
        return _execute(config, recipe, build, mesh, recorded, began)


def _execute(
    config: Any, recipe: str, build: Build, mesh: Mesh, recorded: dict[str, str] | None, began: float
) -> Outcome:
    """On every process; process 0 alone writes the record and talks to the terminal.

    recorded: fingerprints of the data of the run that goes on; None where one begins.
    """
    console = notes(quiet=mesh.rank > 0)
    run_dir = Path(config.out)
    run = build(config, console, mesh)
    refuse_changed(recorded, run.fingerprints(), f"run {run_dir}")
    if mesh.rank == 0:
        record(config, recipe, run)
    console.print(run.summary(), markup=False, soft_wrap=True)
    trainer = run.trainer
    if recorded is not None:
        _take_up(trainer, console)
    if trainer.progress.step == 0:
        run.sample("before")
    outcome = _train(trainer, config.loop.trackers, console, began)
    if outcome.interrupted is not None:
        console.print(_how_to_go_on(trainer, outcome), markup=False, soft_wrap=True)
        return outcome
    final = run.export()  # first: what goes wrong after it costs no result
    run.sample("after")
    if mesh.rank == 0:
        console.print(f"saved {final}\nreport {write_report(run_dir)}", markup=False, soft_wrap=True)
    mesh.wait()
    return outcome


def _take_up(trainer: Trainer, console: Console) -> None:
    """Go on from the newest whole checkpoint, if there is one."""
    if (saved := trainer.checkpoints.latest()) is None:
        said = f"{trainer.run_dir} holds no checkpoint: its run begins again"
    else:
        trainer.restore(saved)
        said = f"resuming at step {saved.step} from {saved.path}"
    console.print(said, markup=False, soft_wrap=True)


def _train(trainer: Trainer, trackers: Sequence[str], console: Console, began: float) -> Outcome:
    """All steps that are left, with their record; then what the run is for is in the model, unless it was stopped."""
    first, after, run_dir = trainer.mesh.rank == 0, trainer.progress.step, trainer.run_dir
    if first:
        attempts.begin(run_dir, after, trainer.mesh.world, began)
    with MetricsLog(run_dir, trackers, after) if first else NoLog() as log:
        outcome = trainer.run(log)
        if first:
            _account(outcome, run_dir, log, console)
        if outcome.interrupted is not None:
            return outcome
        return dataclasses.replace(outcome, result_loss=trainer.load_result(log))


def _how_to_go_on(trainer: Trainer, outcome: Outcome) -> str:
    """What stopped a run, and the command that goes on with it."""
    assert outcome.interrupted is not None
    mesh, run_dir, step = trainer.mesh, trainer.run_dir, outcome.progress.step
    from_step = next(reversed(native.steps(run_dir)), 0)
    lost = f" (which was not finite, so step {from_step} is the last saved)" if from_step < step else ""
    command = f"arriero run {shlex.quote(str(run_dir / 'config.toml'))} --resume"
    if mesh.distributed:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world))
        nodes = f"--nnodes {mesh.world // local} ... " if local < mesh.world else ""
        command = f"torchrun {nodes}--nproc-per-node {local} -m {command}"
    return (
        f"stopped by {outcome.interrupted.name} after step {step} of {trainer.total_steps}{lost}; go on with: {command}"
    )


def _account(outcome: Outcome, run_dir: Path, log: MetricsLog, console: Console) -> None:
    """Say and record how the run's time was spent."""
    p = outcome.progress
    attempts.end(run_dir, p.step, outcome.interrupted.name if outcome.interrupted else "finished")
    spent = attempts.effective(run_dir, p.seconds)
    log.event("time", p.step, **dataclasses.asdict(spent))
    console.print(str(spent), markup=False, soft_wrap=True)


def record(config: Any, recipe: str, run: Run) -> None:
    """Write what decides the run, before step 1; each file whole or not at all, and last that which makes it a run."""
    run_dir = Path(config.out)
    data = {"fingerprints": run.fingerprints(), **run.data_statistics()}
    for name, values in {"environment": describe(), "data": data}.items():
        write_json(run_dir / f"{name}.json", values)
    settled = dataclasses.replace(config, resume=False)
    write_text(run_dir / "config.toml", settings.to_toml(settled, recipe))


def warmup_note(optim: OptimConfig, total_steps: int) -> str:
    """A line for a summary where the learning rate never gets to its peak, or nothing."""
    steps = warmup_steps(optim.warmup, total_steps)
    return f"\nthe warmup takes {steps:,} steps, and there are {total_steps:,}" if steps > total_steps else ""


FEW = 8  # steps


def few_steps_note(loop: LoopConfig, total_steps: int) -> str:
    """A line for a summary where the rows of a small file make fewer steps than change a model much, or nothing."""
    if loop.steps or total_steps >= FEW:
        return ""
    epochs = math.ceil(FEW / total_steps * loop.epochs)
    return f"\nso few steps change little: try smaller ones, as with --batch-rows 1, or --epochs {epochs}"


def compiles(loop: LoopConfig, tokens: int) -> bool:
    """Whether to compile the blocks: as told, or when the run is long enough and a C++ compiler is at hand."""
    if loop.compile != "auto":
        return loop.compile == "on"
    return tokens >= COMPILE_FROM and (torch.cuda.is_available() or shutil.which("g++") is not None)


def alone() -> Mesh:
    """One process, on the GPU if there is one."""
    return Mesh.alone(best_device())
