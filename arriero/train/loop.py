"""The one training loop; every recipe calls it with an objective, a source of batches and a run directory.

A step is: the micro-batches of one global batch, the terms of their losses summed and divided by their counts over the
whole global batch (so 1 x 8 equals 8 x 1, and any number of processes equals one: distributed/engine.py runs them), a
clipped gradient, one optimizer step. Data order, dropout and learning rate are pure functions of (seed, step): a
checkpoint is weights, optimizer state and a few counters, and resuming is exact without saving any generator's state. A
step whose loss or gradient is not finite is skipped and counted, and so is a spike where the settings say what one is.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.data.batch import Batch
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Objective, Totals
from arriero.distributed.peers import peers_of_this_run
from arriero.distributed.watch import Watch
from arriero.errors import CheckpointError, TrainingError
from arriero.optim.build import build_optimizer, empty_state
from arriero.optim.schedule import lr_factor, share_of_steps
from arriero.show.terminal import notes
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.guard import SpikeGuard
from arriero.train.in_backward import InBackward
from arriero.train.metrics import LiveLine, MetricsLog, memory_bytes

log = logging.getLogger(__name__)

BatchSource = Callable[[int], Sequence[Batch]]  # optimizer step -> this process's micro-batches of its global batch
Validate = Callable[[], dict[str, Any]]  # "loss" in nats per token, and whatever else is worth recording


@dataclass
class Progress:
    """What a run has come to; saved with each checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    spikes: int = 0  # steps skipped because their loss or gradient norm was far above the usual
    usual: list[float] = field(default_factory=list)  # what the spike guard knows
    averaged: int = 0  # steps whose weights are in the average
    seconds: float = 0.0
    best_loss: float | None = None  # lowest validation loss so far
    best_step: int | None = None
    validation: dict[int, float] = field(default_factory=dict)  # step -> validation loss


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    interrupted: the signal that stopped it, or None when all steps were done. result_loss: the validation loss of the
    weights that were written in the end; None where nothing was validated, or written.
    """

    progress: Progress
    interrupted: signal.Signals | None
    result_loss: float | None = None


class Trainer:
    """Model, optimizer and progress of one run; `run()` goes from the current step to the last."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        batches: BatchSource,
        total_steps: int,
        loop: LoopConfig,
        optim: OptimConfig,
        run_dir: Path,
        validate: Validate | None = None,
        seconds_at_peak: Callable[[Sequence[Batch]], float] | None = None,
        companions: Callable[[Path], None] | None = None,
    ) -> None:
        """seconds_at_peak: what micro-batches would take one process at its hardware's peak, for the metric `mfu`.

        companions(directory): writes what stands beside a checkpoint's weights, config.json and tokenizer.
        """
        optim.check_batch(loop.batch_rows, loop.micro_rows, engine.mesh.dp_size)
        self.engine, self.objective, self.batches, self.validate = engine, objective, batches, validate
        self.total_steps, self.loop, self.optim, self.run_dir = total_steps, loop, optim, run_dir
        self.parameters = engine.parameters
        peers, holders = peers_of_this_run(engine.mesh.config.timeout), engine.mesh.stage_ranks
        self.checkpoints = Checkpoints(run_dir, peers, holders, loop.keep_last, companions)
        self.in_backward = InBackward(engine, optim) if optim.in_backward else None
        self.optimizer = self.in_backward or build_optimizer(self.parameters, **optim.arguments)
        self.seconds_at_peak = seconds_at_peak
        self.average_from = total_steps - share_of_steps(loop.average, total_steps)  # step
        self.average: dict[str, Tensor] = {}
        self.guard = SpikeGuard(loop.spike)
        self.progress = Progress()
        self.skipped_in_a_row = 0

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Do one optimizer step and return its metrics."""
        began, p = time.perf_counter(), self.progress
        micro_batches = self.batches(p.step)
        waited = time.perf_counter() - began
        mesh = self.engine.mesh
        trained, tokens, at_peak = mesh.count(
            sum(batch.n_trained for batch in micro_batches),
            sum(batch.n_tokens for batch in micro_batches),
            0.0 if self.seconds_at_peak is None else self.seconds_at_peak(micro_batches),
        )
        indices = mesh.share(len(micro_batches) * mesh.dp_size)
        seeds = [_mix(self.loop.seed, p.step, index) for index in indices]  # dropout, as a pure function of the step
        lr = self.optim.lr * self._lr_factor(p.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        totals, norm = self._loss_and_gradient(micro_batches, seeds)
        loss, grad_norm = totals.loss, norm.item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = finite and self.guard.is_spike(loss, grad_norm)
        if finite and not spike:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_skipped(finite)
        p.spikes, p.usual = p.spikes + spike, self.guard.state
        if p.step >= self.average_from:
            self._average()
        seconds = time.perf_counter() - began
        p.step, p.tokens, p.trained_tokens = p.step + 1, p.tokens + int(tokens), p.trained_tokens + int(trained)
        p.seconds += seconds
        metrics = {
            "step": p.step,
            "loss": loss,
            **totals.metrics,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": p.tokens,
            "trained_tokens": p.trained_tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": p.seconds,
            "memory_bytes": memory_bytes(),
            "skipped": p.skipped + p.spikes,
            "waited": waited,
        }
        if self.seconds_at_peak is not None:
            metrics["mfu"] = at_peak / seconds / mesh.world
        return metrics

    def _loss_and_gradient(self, micro_batches: Sequence[Batch], seeds: Sequence[int]) -> tuple[Totals, Tensor]:
        """What the objective sums, and the norm of the gradient, which is clipped, or with `in_backward` applied."""
        if self.in_backward is None:
            totals = self.engine.forward_backward(micro_batches, self.objective, seeds)
            return totals, self.engine.clip_grad_norm_(self.optim.clip or math.inf)
        assert len(micro_batches) == 1, "OptimConfig.check_batch has seen to it"
        objective = self.in_backward.watched(self.objective)
        return self.engine.forward_backward(micro_batches, objective, seeds), self.in_backward.grad_norm()

    @torch.no_grad()
    def _average(self) -> None:
        """Take this step's weights into the running mean (Polyak averaging; arXiv 2407.21783, section 3.4.3)."""
        self.progress.averaged += 1
        if not self.average:
            self.average = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for name, mean in self.average.items():
            mean.lerp_(self.parameters[name], 1 / self.progress.averaged)

    def _lr_factor(self, step: int) -> float:
        o = self.optim
        return lr_factor(step, self.total_steps, o.schedule, o.warmup, o.min_lr, o.decay)

    def _count_skipped(self, finite: bool) -> None:
        if finite:
            self.skipped_in_a_row = 0
            return
        self.progress.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.loop.max_skipped:
            saved = native.steps(self.run_dir)[-1:]
            before = "".join(f"; the weights before: {native.path_of(self.run_dir, s) / native.WEIGHTS}" for s in saved)
            raise TrainingError(
                f"step {self.progress.step}: loss or gradient was not finite for {self.skipped_in_a_row} steps in a "
                f"row (max_skipped); begin a new run with an lr below {self.optim.lr}, or precision fp32{before}"
            )

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self, record: MetricsLog) -> Outcome:
        """Train to the last step, or until SIGTERM or Ctrl-C: then finish the step, save, and return.

        While steps are not finite nothing is saved but after the last one of all: the weights may be broken, and good
        ones would be pruned for them. What is due waits for the next good step.
        """
        tenth = max(1, math.ceil(self.total_steps / 10))
        validate_every, save_every = self.loop.validate_every or tenth, self.loop.save_every or tenth
        p = self.progress
        saved_at = p.step
        console = notes(quiet=self.engine.mesh.rank > 0)
        watch = Watch(self.checkpoints.peers)
        with watch, _signals() as stop, LiveLine(self.total_steps, p.step, console) as line:
            if p.step == 0:
                self._validate(record, line)
            while p.step < self.total_steps and not self.engine.mesh.any(bool(stop) or self.checkpoints.failed):
                metrics = self.step()
                line.update(metrics)
                if p.step % self.loop.log_every == 0 or p.step == self.total_steps:
                    record.step(metrics)
                last = p.step == self.total_steps
                improved = (last or p.step % validate_every == 0) and self._validate(record, line)
                due = p.step // save_every > saved_at // save_every and not self.skipped_in_a_row
                if last or improved or due:
                    self.save()
                    saved_at = p.step
            if saved_at != p.step and not self.skipped_in_a_row:
                self.save()
            self.checkpoints.wait()
        if p.step == self.total_steps:
            return Outcome(p, None)  # whatever signal came during the last step: the others have not seen it
        return Outcome(p, stop[0] if stop else signal.SIGTERM)  # SIGTERM: that another process was sent

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """What `validate` says of the weights as they are."""
        assert self.validate is not None
        self.engine.train(False)
        measured = self.validate()
        self.engine.train()
        return measured

    def _validate(self, record: MetricsLog, line: LiveLine) -> bool:
        """Measure the validation loss; whether it is the lowest so far."""
        if self.validate is None:
            return False
        p, measured = self.progress, self.measure()
        loss = p.validation[p.step] = measured["loss"]
        record.event("validation", step=p.step, **measured)
        line.validation(p.step, measured)
        if self.skipped_in_a_row or not math.isfinite(loss) or (p.best_loss is not None and loss >= p.best_loss):
            return False  # weights that training steps are not finite with are never the best
        p.best_loss, p.best_step = loss, p.step
        return True

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save trained weights, optimizer state and progress, of many processes behind the steps that follow.

        The best checkpoint so far is never pruned. Raises `CheckpointError` when the save before this one has failed.
        """
        groups = {
            "weights": {name: p.detach() for name, p in self.engine.counted.items()},
            "optimizer": self._optimizer_tensors(),
        }
        if self.average:
            groups["average"] = {name: self.average[name] for name in self.engine.counted}
        keep = set() if self.progress.best_step is None else {self.progress.best_step}
        state = {**vars(self.progress), "total_steps": self.total_steps}
        self.checkpoints.save(self.progress.step, groups, state, keep)

    def restore(self, saved: native.Saved) -> None:
        """Take up weights, optimizer and progress where `saved` left them."""
        if saved.state["total_steps"] != self.total_steps:
            raise CheckpointError(
                f"{saved.path}: it belongs to a run of {saved.state['total_steps']} steps, this one has "
                f"{self.total_steps}; resume with the settings and data of config.toml in the run directory"
            )
        self._load_weights(saved)
        self._load_optimizer(saved)
        fields = {key: value for key, value in saved.state.items() if key in Progress.__dataclass_fields__}
        self.progress = Progress(**fields)
        measured = self.progress.validation.items()
        self.progress.validation = {int(step): math.nan if loss is None else loss for step, loss in measured}
        self.guard = SpikeGuard(self.loop.spike, self.progress.usual)
        if self.progress.averaged:
            self.average = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}
            saved.read("average", self.average)

    @torch.no_grad()
    def load_result(self, record: MetricsLog) -> float | None:
        """Put what the run is for into the model: the averaged weights, else those of the best validation loss.

        Returns their validation loss; None where there is none.
        """
        p = self.progress
        if self.average:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
            if self.validate is None:
                return None
            measured = self.measure()
            record.event("averaged", step=p.step, **measured)
            return measured["loss"]
        last = p.validation.get(p.step)
        if p.best_step is None or p.best_step in (0, p.step):  # 0: training never helped, and there is nothing to take
            return last
        try:
            saved = self.checkpoints.at_step(p.best_step)
        except CheckpointError as error:
            log.warning("%s; keeping the last step's weights instead", error)
            return last
        if saved is None:
            return last
        self._load_weights(saved)
        return p.best_loss

    def _load_weights(self, saved: native.Saved) -> None:
        there = {name: shape for name, (shape, _) in saved.shapes("weights").items()}
        here = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if self.engine.mesh.config.pp > 1:  # the rest lies on other stages
            there = {name: shape for name, shape in there.items() if name in here}
        if there != here:
            odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            raise CheckpointError(
                f"{saved.path}: its trained tensors are not this run's (for example {odd[0]}); "
                "resume with the method and targets of config.toml in the run directory"
            )
        saved.read("weights", {name: p.detach() for name, p in self.parameters.items()})

    def _load_optimizer(self, saved: native.Saved) -> None:
        """State with the rows of its parameter is laid out like it, over any number of processes; the rest is whole."""
        tensors: dict[str, Tensor] = {}
        there = saved.shapes("optimizer")  # nothing before the first step
        for key, (shape, dtype) in there.items():
            name, kind = key.rsplit("/", 1)
            if (p := self.parameters.get(name)) is None:  # it lies on another stage
                continue
            tensors[key] = empty_state(p, shape, dtype)
            self.optimizer.state[p][kind] = tensors[key]
        lacking = [name for name, p in self.parameters.items() if not self.optimizer.state[p]]
        if there and lacking:
            raise CheckpointError(
                f"{saved.path}: it holds no optimizer state of {len(lacking)} tensors (for example {lacking[0]}), so "
                "nothing goes on exactly; delete it to resume from the one before, or begin a new run from its weights"
            )
        saved.read("optimizer", tensors)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, parameter in self.engine.counted.items()
            for key, value in self.optimizer.state[parameter].items()
        }


def _mix(seed: int, step: int, index: int) -> int:
    """One 63-bit seed from three numbers: a few rounds of an odd multiplier, so that neighbours do not resemble."""
    mixed = 0
    for value in (seed, step, index):
        mixed = ((mixed ^ value) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & (2**64 - 1)
        mixed ^= mixed >> 29
    return mixed >> 1


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM into a list instead of dying; a second Ctrl-C interrupts at once.

    Outside the main thread signals go to whoever has that.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
