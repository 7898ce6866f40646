"""Initial values of parameters: for each parameter a function of the seed and its name, on any number of processes.

A matrix is drawn in blocks of rows, each from a generator of its own: a process that holds some rows draws only their
blocks, and a model is initialised with the same weights however it is split.
Price: about 5 ns a value; a process draws up to `BLOCK` rows more than it holds, and whole rows where it holds columns.

Values are fp32 on the CPU. `box` is the part of a tensor to compute, one slice for each dimension.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

BLOCK = 256  # rows that one generator draws


def initial_weight(
    name: str,
    shape: Sequence[int],
    box: tuple[slice, ...],
    *,
    seed: int,
    std: float = 0.02,
    depth_scaled: int | None = None,
) -> Tensor:
    """A matrix drawn from N(0, std^2), or a norm's ones. The published initialisation is unknown; this is HF's.

    depth_scaled: of so many layers, the two projections that write into the residual stream get std / sqrt(2 layers),
    so that its size does not grow with depth (GPT-2).
    """
    if len(shape) == 1:
        return torch.ones(shape)[box]
    if depth_scaled and name.endswith(("o_proj.weight", "down_proj.weight")):
        std *= (2 * depth_scaled) ** -0.5
    return _drawn(name, shape, box, seed, lambda block, generator: block.normal_(0.0, std, generator=generator))


def initial_adapter(name: str, shape: Sequence[int], box: tuple[slice, ...], *, seed: int) -> Tensor:
    """B zero, and A [r, in] from U(-b, b) with b = 1 / sqrt(in): PEFT's kaiming_uniform(a=sqrt 5)."""
    if ".lora_B." in name:
        return torch.zeros(shape)[box]
    bound = 1 / math.sqrt(shape[1])
    return _drawn(name, shape, box, seed, lambda block, generator: block.uniform_(-bound, bound, generator=generator))


def whole(shape: Sequence[int]) -> tuple[slice, ...]:
    """The box of all of a tensor."""
    return tuple(slice(0, n) for n in shape)


def _drawn(
    name: str, shape: Sequence[int], box: tuple[slice, ...], seed: int, draw: Callable[[Tensor, Generator], Tensor]
) -> Tensor:
    rows, *columns = box
    first = rows.start - rows.start % BLOCK
    blocks = []
    for start in range(first, rows.stop, BLOCK):
        digest = hashlib.sha256(f"{seed}/{name}/{start}".encode()).digest()
        generator = Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        blocks.append(draw(torch.empty(min(BLOCK, shape[0] - start), *shape[1:]), generator))
    return torch.cat(blocks)[(slice(rows.start - first, rows.stop - first), *columns)]
