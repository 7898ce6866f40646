"""Gives a model that was made and split on the meta device its values: each process those that it holds, and no others.

The size of a model is then bounded by what all processes hold together, not by what one can.
Price: of each tensor in turn the part that is held lies in memory twice, as its source gives it and in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from arriero.distributed.stage import Stage

Values = Callable[[str, Sequence[int], tuple[slice, ...]], Tensor]
"""(name, shape, box) -> the values within `box`, a slice a dimension, of the tensor of that name, on the CPU."""


@torch.no_grad()
def materialise(stage: Stage, device: torch.device, values: Values) -> None:
    """Make the parameters of `stage`, on the meta device so far, real on `device`, and fill them from `values`."""
    stage.to_empty(device=device)
    stage.model.tie_weights()
    for name, parameter in stage.named_parts():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if own.numel():
            own.copy_(values(name, parameter.shape, held(parameter)))


def held(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this process holds, as a slice for each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
