"""Steps each parameter in the backward pass, as soon as its gradient is whole, and drops the gradient.

Gradients then never lie in memory together: where they would be four bytes a parameter, only those of one block are
there (LOMO, arXiv 2306.09782, section 3.1, did so for SGD). Each parameter has an optimizer of its own, and all share
one state, so checkpoints are those of the ordinary step, and so are the weights, bit for bit, without clipping.

The price: what needs the whole gradient before the first update is impossible (clipping, accumulation, the spike
guard; train/config.py refuses them), and of a step that goes wrong only this can be undone: a loss that is not finite
is known before the backward pass and changes nothing; of a gradient that is not finite nothing is applied, but the
other parameters are stepped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from arriero.data.batch import Batch
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Objective
from arriero.errors import ConfigError
from arriero.model.llama import Llama
from arriero.optim.build import CombinedOptimizer, build_optimizer
from arriero.train.config import OptimConfig


class InBackward(CombinedOptimizer):
    """The optimizer of `optim` over the engine's parameters, which a backward pass steps."""

    def __init__(self, engine: Engine, optim: OptimConfig) -> None:
        """Raises `ConfigError` for Muon on many processes: it would communicate within the backward's communication."""
        if optim.optimizer == "muon" and engine.mesh.world > 1:
            raise ConfigError(
                f"in_backward is on with muon on {engine.mesh.world} processes, whose matrices muon has to gather; "
                "take adamw or adamw8bit, or leave in_backward off"
            )
        each = {name: build_optimizer({name: p}, **optim.arguments) for name, p in engine.parameters.items()}
        super().__init__(*each.values())
        self.engine = engine
        self._sound = True  # whether the loss is finite, on all processes
        self._squares = torch.zeros((), device=engine.mesh.device)  # of this process's gradients since `grad_norm`
        for name, p in engine.parameters.items():
            p.register_post_accumulate_grad_hook(functools.partial(self._take, each[name]))

    def watched(self, objective: Objective) -> Objective:
        """The same objective, whose loss this optimizer sees: if it is not finite, its gradients are not applied."""

        def watched(model: Llama, batch: Batch) -> Mapping[str, Tensor]:
            sums = objective.sums(model, batch)
            total = torch.stack([sums[name].detach() for name in objective.weights]).sum()
            self._sound = bool(torch.isfinite(self.engine.mesh.sum(total)))
            return sums

        return dataclasses.replace(objective, sums=watched)

    @torch.no_grad()
    def _take(self, optimizer: Optimizer, parameter: Tensor) -> None:
        square = self.engine.squared_norm(parameter)
        self._squares += square
        if self._sound and torch.isfinite(square):
            optimizer.step()
        parameter.grad = None

    def grad_norm(self) -> Tensor:
        """The norm of the whole gradient, over all processes, that was seen since the last call."""
        squares, self._squares = self._squares, torch.zeros_like(self._squares)
        return self.engine.mesh.sum(squares).sqrt()

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Nothing is left to do: the backward pass has done it."""
