"""Runs the micro-batches of a step forward and backward under any parallelism, and returns the global sums.

A training loop passes its data-parallel shard of a global batch and reads sums; the engine pads the batches, splits
them over context-parallel processes, sends them through the pipeline, and reduces. Each term of the loss is divided by
its count over the whole global batch (objective.py), so any number of processes gives the losses and gradients of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate

from arriero.data.batch import Batch
from arriero.distributed.context import HeldDocuments
from arriero.distributed.gather import gathered, source_of
from arriero.distributed.mesh import Mesh
from arriero.distributed.objective import Objective, Totals
from arriero.distributed.pipeline import Pipeline
from arriero.distributed.stage import MicroBatch, StageModel
from arriero.model.build import empty_model, tensor_shapes
from arriero.model.llama import EMBEDDINGS, Llama
from arriero.model.lora import Active, using_adapter


class Engine:
    """The pipeline stages of this process, and the mesh."""

    def __init__(self, stages: list[StageModel], mesh: Mesh) -> None:
        self.stages, self.mesh = stages, mesh
        self._pipeline = Pipeline(stages, mesh) if mesh.config.pp > 1 else None

    @classmethod
    def alone(cls, model: Llama) -> Engine:
        """The engine of a single process, with the whole model."""
        mesh = Mesh.alone(model.device)
        return cls([StageModel(model, 0, range(model.config.n_layers))], mesh)

    @property
    def model(self) -> Llama:
        """The model, or this process's part of it."""
        return self.stages[0].model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of this process (or its shards of them), by their names in the whole model."""
        return {name: p for stage in self.stages for name, p in stage.named_parts() if p.requires_grad}

    @property
    def counted(self) -> dict[str, nn.Parameter]:
        """`parameters` without a tied copy, which another process saves and counts."""
        copied = any(stage.tied_copy for stage in self.stages)
        return {name: p for name, p in self.parameters.items() if not (copied and name == EMBEDDINGS)}

    def train(self, mode: bool = True) -> None:
        """Put all stages into training (dropout on) or evaluation mode."""
        for stage in self.stages:
            stage.train(mode)

    @contextmanager
    def using_adapter(self, active: Active) -> Iterator[None]:
        """Let another adapter act while the block runs, or none: a policy without its adapter is its reference."""
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(using_adapter(stage.model, active))
            yield

    # -- loss and gradients --------------------------------------------------------------------------------------

    def forward_backward(
        self, micro_batches: Sequence[Batch], objective: Objective, seeds: Sequence[int] | None = None
    ) -> Totals:
        """Add the gradient of the global batch to the parameters; returns the objective's sums over it.

        micro_batches: of this process's data-parallel group. seeds: for the dropout of each micro-batch. Every process
        has to call it, with equally many micro-batches.
        """
        counts = self._counts(micro_batches, objective)
        given = [None] * len(micro_batches) if seeds is None else seeds
        parts = self._local(micro_batches)
        micro = self._begin([MicroBatch(*part) for part in zip(parts, given, strict=True)], objective, counts)
        if self._pipeline is not None:
            assert all(p.grad is None for p in self.parameters.values()), "tied gradients are added up once"
            self._pipeline.run(micro, backward=True)
            self._add_tied_gradients()
            return self._totals(objective, counts)
        stage, last = self.stages[0], len(micro) - 1
        for index, one in enumerate(micro):
            if self.mesh.distributed:
                stage.set_requires_gradient_sync(index == last or self.mesh.config.reduce_every)  # type: ignore[operator]
            stage(one.batch.tokens, index).backward()
        return self._totals(objective, counts)

    @torch.no_grad()
    def _add_tied_gradients(self) -> None:
        """Add up the gradients of a tied matrix on the first stage (embeddings) and on the last (head).

        Equal gradients and moments keep the two copies equal to the bit, so the weights need not be sent.
        """
        mesh, tied = self.mesh, self.parameters.get(EMBEDDINGS)
        if tied is None or tied.grad is None or not self.model.tied:
            return
        ours = _local(tied.grad)
        if ours.numel():
            theirs, apart = torch.empty_like(ours), mesh.world - len(mesh.stage_ranks)  # from first to last stage
            peer = mesh.rank + (apart if mesh.coordinate("pp") == 0 else -apart)
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, ours, peer), dist.P2POp(dist.irecv, theirs, peer)]
            ):
                work.wait()
            ours += theirs

    @torch.no_grad()
    def measure(self, batch_of: Callable[[int], Batch], n: int, objective: Objective) -> Totals:
        """The objective's sums over batches 0 to n - 1, without gradient. Every process has to call it.

        The batches are divided among the data-parallel groups; each makes its own only.
        """
        mesh = self.mesh
        mine = [start + mesh.dp_rank for start in range(0, n, mesh.dp_size)]
        counted: dict[str, float] = dict.fromkeys(objective.weights, 0.0)
        sums: dict[str, Tensor] = {}
        for index in mine:
            batch = batch_of(min(index, n - 1))
            micro = MicroBatch(self._local([batch])[0], counted=index < n)
            self._forward(self._begin([micro], objective, {}))
            for name, value in self.stages[-1].sums.items():
                sums[name] = sums.get(name, 0) + value
            for name, count in objective.counts(batch).items():  # the names are the same on every process
                counted[name] = counted.get(name, 0.0) + (count if index < n else 0.0)
        self.stages[-1].sums = sums
        self._reshard()
        return self._totals(objective, dict(zip(counted, mesh.count(*counted.values()), strict=True)))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], function: Callable[[Llama, Batch], Tensor]) -> list[Tensor]:
        """The values of `function` for each token of these batches, without gradient: fp32 [1, N] for each batch.

        function(model, batch): values [1, n] of the batch's tokens (log-probabilities of a policy or a reference,
        values, rewards); with context parallelism it is given a part of a batch. batches: of this process's
        data-parallel group, all of whose processes get all values. Every process has to call it, with equally many
        batches.
        """
        found: list[Tensor] = []

        def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
            found.append(function(model, batch).float())
            return {"loss": found[-1].new_zeros(())}

        parts = self._local(batches)
        self._forward(self._begin([MicroBatch(part) for part in parts], Objective(sums, lambda _: {"loss": 0}), {}))
        self._reshard()
        here = found or [torch.zeros(1, part.n_tokens, device=self.mesh.device) for part in parts]
        if self.mesh.config.pp > 1:  # only the last stage has the values
            group = self.mesh.sub("pp").get_group()
            for values in here:
                dist.broadcast(values, dist.get_global_rank(group, group.size() - 1), group=group)
        whole = [
            part.layout.gather(values[0])[None] if isinstance(part.layout, HeldDocuments) else values
            for part, values in zip(parts, here, strict=True)
        ]
        return [values[:, : batch.n_tokens] for batch, values in zip(batches, whole, strict=True)]

    def _forward(self, micro: Sequence[MicroBatch]) -> None:
        if self._pipeline is not None:
            self._pipeline.run(micro, backward=False)
            return
        for index, one in enumerate(micro):
            self.stages[0](one.batch.tokens, index)

    def _counts(self, batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
        """What each sum is divided by, over the global batch; `batches` are this process's shard of it."""
        each = [objective.counts(batch) for batch in batches]
        own = {name: sum(one[name] for one in each) for name in each[0]}
        return dict(zip(own, self.mesh.count(*own.values()), strict=True))

    def _totals(self, objective: Objective, counts: Mapping[str, float]) -> Totals:
        """The sums over all processes; in a pipeline only the last stage has any."""
        names, last = sorted(counts), self.stages[-1]
        here = last.last and self.mesh.is_first("tp")
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        own = torch.stack([last.sums[name].double() if here else zero for name in names])
        return Totals(dict(zip(names, self.mesh.sum(own).tolist(), strict=True)), counts, objective.weights)

    def _reshard(self) -> None:
        """Free the gathered weights after a forward pass without a backward pass, which would have done it.

        Until then a module's parameters are the gathered tensors, for which the optimizer has no state, and into which
        no checkpoint is loaded.
        """
        for stage in self.stages:
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _begin(self, micro: list[MicroBatch], objective: Objective, counts: Mapping[str, float]) -> list[MicroBatch]:
        for stage in self.stages:
            stage.begin(micro, objective, counts)
        return micro

    def _local(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's part of each batch.

        Batches are padded to a length that can be split, and in a pipeline all to one length, since a stage receives
        one shape.
        """
        c = self.mesh.config
        parts = 2 * c.cp * c.tp if c.cp > 1 else c.tp
        lengths = [-(-batch.n_tokens // parts) * parts for batch in batches]
        if c.pp > 1:
            lengths = [max(lengths)] * len(lengths)
        batches = [batch.padded(length) for batch, length in zip(batches, lengths, strict=True)]
        if c.cp == 1:
            return batches
        layouts = [HeldDocuments(batch.documents, self.mesh.sub("cp").get_group()) for batch in batches]
        return [batch.part(layout.held, layout) for batch, layout in zip(batches, layouts, strict=True)]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm over all processes is at most `max_norm`; returns the norm before."""
        parameters = self.parameters.values()
        if not self.mesh.distributed:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        squares = torch.zeros((), device=self.mesh.device)
        for p in self.counted.values():
            squares += self.squared_norm(p)
        norm = self.mesh.sum(squares).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(self.mesh.home)
        for p in parameters:
            if p.grad is not None:
                _local(p.grad).mul_(factor)
        return norm

    def squared_norm(self, parameter: Tensor) -> Tensor:
        """This process's contribution to the squared norm of a parameter's gradient, fp32; 0 without a gradient."""
        if parameter.grad is None:
            return torch.zeros((), device=self.mesh.device)
        return _local(parameter.grad).float().square().sum() / _copies(parameter)

    # -- whole tensors -------------------------------------------------------------------------------------------

    def dense_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights as a plain model has them, one whole tensor at a time, on the CPU of process 0.

        Names and order are those of `tensor_shapes`: adapters are folded into their weights, quantised weights are
        multiplied out. Nothing comes on the other processes; every process has to iterate to the end.
        """
        sources = {name: source for stage in self.stages for name, source in stage.dense_sources()}
        names = tensor_shapes(self.model.config, self.model.head_kind)
        return gathered(sources, self.mesh, list(names).index)

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters likewise, as they are: of an adapted model its adapter, in fp32."""
        return gathered({name: source_of(p) for name, p in self.counted.items()}, self.mesh, _in_order)

    def whole_model(self) -> Llama | None:
        """The model on process 0, to be read, not trained: itself where there is one process, else a plain one.

        That is gathered on the CPU, with adapters folded. None on the other processes; every process has to call it.
        """
        if not self.mesh.distributed:
            return self.model
        state = dict(self.dense_tensors())
        if self.mesh.rank > 0:
            return None
        model = empty_model(self.model.config, self.model.head_kind)
        model.load_state_dict(state, assign=True, strict=False)  # a tied head is missing
        model.tie_weights()
        model.model.compute_like(self.model.model)
        return model.eval()


def _in_order(name: str) -> list[Any]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a sharded tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if isinstance(placement, Replicate))
