"""A pipeline stage: consecutive layers of the model, and on the last stage the objective, as one module.

Without pipeline parallelism there is one stage, the whole model. With it, a stage is the same `Llama` in which the
layers of other stages are replaced by pass-throughs, so that parameters keep their names and model/llama.py needs no
code for it. An objective that calls `model.model(batch.tokens, ...)` works unchanged on the last stage, where
`batch.tokens` are the hidden states received from the stage before.
Where embeddings and head are tied, the first and the last stage hold a copy each (`tied_copy`).
Model and objective are one module because FSDP gathers sharded weights only for the forward of the module it wraps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arriero.data.batch import Batch
from arriero.distributed.gather import Source, source_of, whole_tensor
from arriero.distributed.objective import Objective
from arriero.model.build import empty_model
from arriero.model.linear import Product, named_products
from arriero.model.llama import EMBEDDINGS, HEAD, Llama
from arriero.model.lora import plain_name
from arriero.model.quantized import QuantizedLinear


@dataclass(frozen=True)
class MicroBatch:
    """This process's part of a micro-batch."""

    batch: Batch
    seed: int | None = None  # of dropout; None draws on
    counted: bool = True  # False: padding, because another process has one micro-batch more


class StageModel(nn.Module):
    """Layers `layers` of a Llama; `forward` returns the next stage's input, and on the last stage the loss.

    `sums` accumulates the objective's sums by name, over the micro-batches since `begin`.
    """

    def __init__(self, model: Llama, index: int, layers: range) -> None:
        super().__init__()
        self.index, self.layers = index, layers
        self.last = layers.stop == model.config.n_layers
        self.model = model if len(layers) == model.config.n_layers else part_of(model, layers)
        self.begin([], None, {})

    def begin(
        self, micro_batches: Sequence[MicroBatch], objective: Objective | None, counts: Mapping[str, float]
    ) -> None:
        """Prepare the forward passes of a step. counts: what the objective's terms are divided by, 1 where missing."""
        self.micro_batches, self.objective = micro_batches, objective
        self.scales = {}
        if objective is not None:
            self.scales = {name: weight / (counts.get(name) or 1) for name, weight in objective.weights.items()}
        self.sums: dict[str, Tensor] = {}

    def forward(self, x: Tensor, index: int | Tensor) -> Tensor:
        """x: ids [1, n] on the first stage, hidden states [1, n, D] on others; index: which micro-batch."""
        micro = self.micro_batches[int(index)]
        batch = dataclasses.replace(micro.batch, tokens=x)
        if micro.seed is not None:
            torch.manual_seed(micro.seed + self.index)
        if not self.last:
            hidden = self.model.model(batch.tokens, batch.layout)
            assert isinstance(hidden, Tensor)
            return hidden
        assert self.objective is not None
        sums = {name: value * micro.counted for name, value in self.objective.sums(self.model, batch).items()}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        return torch.stack([sums[name] * scale for name, scale in self.scales.items()]).sum()

    @property
    def tied_copy(self) -> bool:
        """Whether the head is a copy of the embedding matrix of another stage."""
        return self.last and self.layers.start > 0 and self.model.tied

    def named_parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters by their names in the whole model; a tied copy's name is that of the embeddings."""
        for name, parameter in self.model.named_parameters():
            yield EMBEDDINGS if self.tied_copy and name == HEAD else plain_name(name), parameter

    def dense_sources(self) -> Iterator[tuple[str, Source]]:
        """The tensors that a plain model has here, by their name there: each linear as one dense matrix."""
        inside: tuple[str, ...] = ()
        for name, module in named_products(self.model):
            inside += (name + ".",)
            assert isinstance(module, Product)
            shape = module.out_features, module.in_features
            yield f"{name}.weight", Source(shape, module.dtype, functools.partial(module.dense, whole_tensor))
        for name, parameter in self.model.named_parameters():
            if not name.startswith(inside) and not (name == HEAD and self.model.tied):
                yield name, source_of(parameter)

    def quantized(self) -> Iterator[tuple[str, QuantizedLinear]]:
        """The linears here whose weight is held in few bits, by the weight's name in the whole model."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantizedLinear):
                yield plain_name(f"{name}.weight"), module


class PassThrough(nn.Module):
    """Replaces a module of the model that belongs to another stage."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """x."""
        return x


def part_of(model: Llama, layers: range) -> Llama:
    """A Llama that holds `layers` of `model`, the embeddings with the first of them and norm and head with the last."""
    part = empty_model(model.config, model.head_kind)
    part.train(model.training)
    part.model.compute_like(model.model)
    part.model.embed_tokens = model.model.embed_tokens if layers.start == 0 else PassThrough()  # type: ignore[assignment]
    for index in range(model.config.n_layers):
        part.model.layers[index] = model.model.layers[index] if index in layers else PassThrough()
    last = layers.stop == model.config.n_layers
    part.model.norm = model.model.norm if last else PassThrough()  # type: ignore[assignment]
    part.set_head(model.head if last else PassThrough())
    return part
