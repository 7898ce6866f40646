"""Fills the parameters of a model that was made and split on the meta device; each process fills its own shards only.

A linear that holds its weight in few bits is given each dense matrix in turn, and keeps the codes.

The size of a model is then bounded by the memory of all processes together, not by that of one.
Price: one shard at a time is in memory twice, as read from its source and as the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from arriero.distributed.stage import StageModel
from arriero.model.initial import whole

Values = Callable[[str, Sequence[int], tuple[slice, ...]], Tensor]
"""(name, shape, box) -> the values within `box`, a slice a dimension, of the tensor of that name, on the CPU."""


@torch.no_grad()
def materialise(stage: StageModel, device: torch.device, values: Values) -> None:
    """Move the parameters of `stage` from the meta device to `device`, and fill them from `values`."""
    stage.to_empty(device=device)
    stage.model.tie_weights()
    for name, parameter in stage.named_parts():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if own.numel():
            own.copy_(values(name, parameter.shape, held(parameter)))
    for name, linear in stage.quantized():  # whole on each process, and dense for one matrix at a time
        shape = linear.out_features, linear.in_features
        linear.fill(values(name, shape, whole(shape)))


def held(tensor: Tensor) -> tuple[slice, ...]:
    """This process's shard of a tensor, as a slice of the whole one for each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
