"""NormalFloat 4 (QLoRA, arXiv 2305.14314, section 3 and appendix E): 4.5 bits a weight.

The values of a matrix, row after row, are cut into blocks of 64. A block is stored as its largest magnitude (fp32) and,
for each value, the nearest of 16 levels of value / magnitude; the levels are quantiles of a normal distribution, with
0, -1 and 1 among them. Two levels lie in a byte, the first in its high half: codes and scales are those of bitsandbytes
without double quantisation, bit for bit.

Shapes: O outputs, I inputs of a matrix [O, I]; codes uint8 [ceil(O I / 2)], scales fp32 [ceil(O I / 64)].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # values that share a scale
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_AT_ONCE = 1 << 20  # values that are turned together, so that temporaries stay small


def shapes(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and scales of a matrix."""
    n = prod(shape)
    return (-(-n // 2),), (-(-n // BLOCK),)


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix."""
    values = weight.reshape(-1)
    parts = [_quantize(values[start : start + _AT_ONCE].float()) for start in range(0, len(values), _AT_ONCE)]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    n = len(values)
    blocks = F.pad(values, (0, -n % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    borders = torch.tensor(LEVELS, device=values.device)
    borders = (borders[1:] + borders[:-1]) / 2
    normed = blocks / torch.where(scales == 0, 1.0, scales)[:, None]
    levels = torch.bucketize(normed, borders, out_int32=True).to(torch.uint8).view(-1)[: n + n % 2].view(-1, 2)
    return levels[:, 0] << 4 | levels[:, 1], scales


def dequantize(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The matrix [O, I]: level times scale in fp32, rounded once to `dtype`."""
    n = prod(shape)
    out = torch.empty(-(-n // BLOCK), BLOCK, dtype=dtype, device=codes.device)
    for start in range(0, len(out), _AT_ONCE // BLOCK):
        blocks = slice(start, start + _AT_ONCE // BLOCK)
        levels = _levels(codes[blocks.start * BLOCK // 2 : blocks.stop * BLOCK // 2])
        torch.mul(levels, scales[blocks, None].float(), out=out[blocks])
    return out.view(-1)[:n].view(*shape)


def _levels(codes: Tensor) -> Tensor:
    """Levels of whole blocks, fp32 [., 64]; both of a byte are looked up at once, as one number of 64 bits."""
    levels = torch.tensor(LEVELS, device=codes.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.int64).view(-1)
    return (
        pairs.index_select(0, F.pad(codes, (0, -len(codes) % (BLOCK // 2))).int()).view(torch.float32).view(-1, BLOCK)
    )
