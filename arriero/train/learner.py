"""What trains: a model on its engine, an objective, an optimizer, and what is known of the steps so far.

A step takes the micro-batches of one global batch (this process's share of them). The terms of their losses are summed
and divided by their counts over the whole global batch, so 1 x 8 equals 8 x 1, and any number of processes equals one
(distributed/engine.py runs them); the gradient is clipped, the optimizer steps. Learning rate and dropout are pure
functions of (seed, step): a learner's state is weights, optimizer state and a few counters, and resuming is exact
without saving any generator's state. A step whose loss or gradient is not finite is skipped and counted, and so is a
spike where the settings say what one is.

A run has one learner, or several that share nothing but the mesh (a policy and a value model). A learner knows nothing
of run directories, logs, signals or when to validate: that is train/loop.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arriero.checkpoint import native
from arriero.data.batch import Batch
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Objective, Totals
from arriero.errors import CheckpointError
from arriero.optim.build import build_optimizer, empty_state
from arriero.optim.schedule import lr_factor, share_of_steps
from arriero.train.config import OptimConfig
from arriero.train.guard import SpikeGuard
from arriero.train.in_backward import InBackward


@dataclass
class Counters:
    """What a learner has done; saved with each checkpoint."""

    step: int = 0  # optimizer steps done, skipped ones included
    tokens: int = 0  # through the model, padding included
    trained_tokens: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    spikes: int = 0  # steps skipped because their loss or gradient norm was far above its running mean
    averaged: int = 0  # steps whose weights are in the average


class Learner:
    """A model and whatever changes its weights."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        optim: OptimConfig,
        total_steps: int,
        *,
        seed: int = 0,
        spike: float = 0.0,
        average: float = 0.0,
        seconds_at_peak: Callable[[Sequence[Batch]], float] | None = None,
    ) -> None:
        """total_steps: optimizer steps that the learning rate's schedule is laid over.

        seed: of dropout. spike, average: as in `LoopConfig`. seconds_at_peak: what micro-batches would take one process
        at its hardware's peak, for the metric `mfu`.
        """
        self.engine, self.objective, self.optim, self.total_steps, self.seed = (
            engine, objective, optim, total_steps, seed,
        )  # fmt: skip
        self.parameters = engine.parameters
        self.in_backward = InBackward(engine, optim) if optim.in_backward else None
        self.optimizer = self.in_backward or build_optimizer(self.parameters, **optim.arguments)
        self.guard = SpikeGuard(spike)
        self.counters = Counters()
        self.skipped_in_a_row = 0
        self.average_from = total_steps - share_of_steps(average, total_steps)  # step
        self.average: dict[str, Tensor] = {}
        self.seconds_at_peak = seconds_at_peak
        self.at_peak = 0.0  # seconds of all processes that the steps of this start would take at the hardware's peak

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Any]:
        """Do one optimizer step and return its metrics. Every process has to call it, with equally many batches."""
        c, mesh = self.counters, self.engine.mesh
        trained, tokens, at_peak = mesh.count(
            sum(batch.n_trained for batch in micro_batches),
            sum(batch.n_tokens for batch in micro_batches),
            0.0 if self.seconds_at_peak is None else self.seconds_at_peak(micro_batches),
        )
        indices = mesh.local_shard(len(micro_batches) * mesh.dp_size)
        seeds = [mixed(self.seed, c.step, index) for index in indices]  # dropout, as a pure function of the step
        lr = self.optim.lr * self._lr_factor(c.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        totals, norm = self._loss_and_gradient(micro_batches, seeds)
        loss, grad_norm = totals.loss, norm.item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = finite and self.guard.is_spike(loss, grad_norm)
        if finite and not spike:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        c.skipped, c.spikes = c.skipped + (not finite), c.spikes + spike
        if c.step >= self.average_from:
            self._average()
        c.step, c.tokens, c.trained_tokens = c.step + 1, c.tokens + int(tokens), c.trained_tokens + int(trained)
        self.at_peak += at_peak
        return {
            "loss": loss,
            **totals.metrics,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": c.tokens,
            "trained_tokens": c.trained_tokens,
            "skipped": c.skipped + c.spikes,
        }

    def _loss_and_gradient(self, micro_batches: Sequence[Batch], seeds: Sequence[int]) -> tuple[Totals, Tensor]:
        """What the objective sums, and the norm of the gradient, which is clipped, or with `in_backward` applied."""
        if self.in_backward is None:
            totals = self.engine.forward_backward(micro_batches, self.objective, seeds)
            return totals, self.engine.clip_grad_norm_(self.optim.clip or math.inf)
        assert len(micro_batches) == 1, "OptimConfig.check_batch has seen to it"
        objective = self.in_backward.watched(self.objective)
        return self.engine.forward_backward(micro_batches, objective, seeds), self.in_backward.grad_norm()

    def _lr_factor(self, step: int) -> float:
        o = self.optim
        return lr_factor(step, self.total_steps, o.schedule, o.warmup, o.min_lr, o.decay)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and gradients: to measure, or to let the model make what it learns from."""
        self.engine.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()

    # -- averaged weights ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _average(self) -> None:
        """Take this step's weights into the running mean (Polyak averaging; arXiv 2407.21783, section 3.4.3)."""
        self.counters.averaged += 1
        if not self.average:
            self.average = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for name, mean in self.average.items():
            mean.lerp_(self.parameters[name], 1 / self.counters.averaged)

    @torch.no_grad()
    def load_average(self) -> None:
        """Put the averaged weights, where there are some, into the model."""
        for name, mean in self.average.items():
            self.parameters[name].copy_(mean)

    # -- what a checkpoint holds of it ---------------------------------------------------------------------------

    def groups(self, prefix: str = "") -> dict[str, dict[str, Tensor]]:
        """The tensors to save: weights, optimizer state and, where there is one, the average; `prefix` them all."""
        counted = self.engine.counted
        found = {"weights": {name: p.detach() for name, p in counted.items()}, "optimizer": self.optimizer_tensors()}
        if self.average:
            found["average"] = {name: self.average[name] for name in counted}
        return {prefix + name: tensors for name, tensors in found.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by "parameter/kind", of the parameters that this process answers for."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.engine.counted.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    @property
    def state(self) -> dict[str, Any]:
        """The counters to save, as JSON holds them."""
        return {**vars(self.counters), "usual": self.guard.state}

    def restore(self, saved: native.Saved, state: Mapping[str, Any], prefix: str = "") -> None:
        """Take up what `groups(prefix)` and `state` gave. Raises `CheckpointError` where that is not this learner's."""
        self.load_weights(saved, prefix)
        self._load_optimizer(saved, prefix)
        self.counters = Counters(**{key: state[key] for key in Counters.__dataclass_fields__ if key in state})
        self.guard = SpikeGuard(self.guard.deviations, state.get("usual", ()))
        if self.counters.averaged:
            self.average = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}
            saved.read(prefix + "average", self.average)

    def load_weights(self, saved: native.Saved, prefix: str = "") -> None:
        """Take up the weights alone."""
        there = {name: shape for name, (shape, _) in saved.shapes(prefix + "weights").items()}
        here = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if self.engine.mesh.config.pp > 1:  # the rest lies on other stages
            there = {name: shape for name, shape in there.items() if name in here}
        if there != here:
            odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            raise CheckpointError(
                f"{saved.path}: its trained tensors are not this run's (for example {odd[0]}); "
                "resume with the method and targets of config.toml in the run directory"
            )
        saved.read(prefix + "weights", {name: p.detach() for name, p in self.parameters.items()})

    def _load_optimizer(self, saved: native.Saved, prefix: str) -> None:
        """State with the rows of its parameter is laid out like it, over any number of processes; the rest is whole."""
        tensors: dict[str, Tensor] = {}
        there = saved.shapes(prefix + "optimizer")  # nothing before the first step
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
        saved.read(prefix + "optimizer", tensors)


def mixed(seed: int, step: int, index: int) -> int:
    """One 63-bit seed from three numbers: a few rounds of an odd multiplier, so that neighbours do not resemble."""
    out = 0
    for value in (seed, step, index):
        out = ((out ^ value) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & (2**64 - 1)
        out ^= out >> 29
    return out >> 1
