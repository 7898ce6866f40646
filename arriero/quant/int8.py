"""Eight-bit integers with a scale for each row: w = code * scale, scale = max |row| / 127 (8 bits a weight).

Symmetric, round to nearest even (LLM.int8(), arXiv 2208.07339, section 2.1, for weights; activations stay as they are).

Shapes: O outputs, I inputs of a matrix [O, I]; codes int8 [O, I], scales fp32 [O].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 127


def shapes(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and scales of a matrix."""
    return tuple(shape), (shape[0],)


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix."""
    wide = weight.float()
    scales = wide.abs().amax(1) / LARGEST
    return (wide / torch.where(scales == 0, 1.0, scales)[:, None]).round().to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The matrix [O, I]: code times scale in fp32, rounded once to `dtype`."""
    return torch.mul(codes, scales.float()[:, None], out=torch.empty(*shape, dtype=dtype, device=codes.device))
