"""Runs the micro-batches of a step forward and backward, whatever the parallelism, and gives back the global loss.

A training loop hands over its data-parallel share of a global batch and reads one number; how that share is padded,
split over a row's processes, sent down a pipeline and reduced is decided here. The loss is divided by the trained
tokens of the whole GLOBAL batch, so any number of processes gives the losses and gradients of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate

from arriero.data.loader import Batch
from arriero.distributed.mesh import Mesh
from arriero.distributed.stage import MicroBatch, Objective, Stage
from arriero.optim.groups import trained_parameters


class Engine:
    """The stages of this process and the mesh they lie on."""

    def __init__(self, stages: list[Stage], mesh: Mesh) -> None:
        self.stages, self.mesh = stages, mesh

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters that this process holds (a part of), by their name in the whole model."""
        return {name: p for stage in self.stages for name, p in trained_parameters(stage.model).items()}

    def train(self, mode: bool = True) -> None:
        """Put all stages into training (dropout on) or evaluation mode."""
        for stage in self.stages:
            stage.train(mode)

    # -- loss and gradients --------------------------------------------------------------------------------------

    def trained_tokens(self, micro_batches: Sequence[Batch]) -> int:
        """Trained tokens of the whole global batch, of which `micro_batches` are this process's share."""
        here = sum(batch.n_trained for batch in micro_batches)
        return self.mesh.count(here) if self.mesh.distributed else here

    def forward_backward(
        self, micro_batches: Sequence[Batch], objective: Objective, trained: int, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Add the gradient of the global batch to the parameters; returns its loss a trained token, fp32, detached.

        micro_batches: this data-parallel share's. trained: `trained_tokens` of the whole batch. seeds: of each
        micro-batch's dropout. Every process has to call it, with equally many micro-batches.
        """
        micro = self._begin(micro_batches, objective, trained, seeds)
        stage, last = self.stages[0], len(micro) - 1
        total = torch.zeros((), device=self.mesh.device)
        for index, one in enumerate(micro):
            if self.mesh.distributed:
                stage.set_requires_gradient_sync(index == last or self.mesh.config.reduce_every)  # type: ignore[operator]
            loss = stage(one.batch.tokens, index)
            loss.backward()
            total += loss.detach()
        return self._summed(total)

    @torch.no_grad()
    def loss(self, micro_batches: Sequence[Batch], objective: Objective) -> Tensor:
        """The loss of a global batch summed over its trained tokens, fp32, no gradient. Every process calls it."""
        micro = self._begin(micro_batches, objective, 1, None)
        total = torch.zeros((), device=self.mesh.device)
        for index, one in enumerate(micro):
            total += self.stages[0](one.batch.tokens, index)
        return self._summed(total)

    def _begin(
        self, micro_batches: Sequence[Batch], objective: Objective, trained: int, seeds: Sequence[int] | None
    ) -> list[MicroBatch]:
        given = [None] * len(micro_batches) if seeds is None else seeds
        micro = [MicroBatch(batch, None, seed) for batch, seed in zip(micro_batches, given, strict=True)]
        for stage in self.stages:
            stage.micro_batches, stage.objective, stage.trained = micro, objective, trained
        return micro

    def _summed(self, loss: Tensor) -> Tensor:
        """The loss summed over rows and parts of rows."""
        return self.mesh.sum(loss if self.mesh.leads("tp") else torch.zeros_like(loss))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm over all processes is at most `max_norm`; returns the norm before."""
        parameters = self.parameters.values()
        if not self.mesh.distributed:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        squares = torch.zeros((), device=self.mesh.device)
        for p in parameters:
            if p.grad is not None:
                squares += _local(p.grad).float().square().sum() / _copies(p)
        norm = self.mesh.sum(squares).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for p in parameters:
            if p.grad is not None:
                _local(p.grad).mul_(factor)
        return norm

    # -- whole tensors -------------------------------------------------------------------------------------------

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the model whole, on the CPU of process 0, by name; empty on the others.

        Every process has to call it. One tensor at a time is gathered.
        """
        return dict(self.full_tensors())

    def full_gradients(self) -> dict[str, Tensor]:
        """The gradients of the trained parameters likewise."""
        return dict(self._whole({name: p.grad for name, p in self.parameters.items() if p.grad is not None}))

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `full_state_dict` one by one, for a file larger than memory."""
        return self._whole({name: p for stage in self.stages for name, p in stage.model.state_dict().items()})

    @torch.no_grad()
    def _whole(self, here: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in here.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.mesh.rank == 0:
                yield name, whole.cpu()


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a sharded tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if isinstance(placement, Replicate))
