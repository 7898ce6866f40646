"""Matrices in few bits as GGUF's blocks of 32: codes and scales as they were chosen, packed and unpacked.

    Q8_0  scale fp16, 32 codes from -127 to 127                   int8 (its scale of a row stands in each block)
    Q4_0  scale fp16, 16 bytes: code i low, code i + 16 high      int4 (code - 8)
    Q4_1  scale and minimum fp16, the same bytes                  int4-affine

Scales that fp16 does not hold exactly do not fit, nor do groups that are no multiple of 32 (NF4's levels never do).
Shapes: O outputs, I inputs, N = I / 32 blocks of a row.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from arriero.quant.packed import Quantized, from_indices

Kind = gguf.GGMLQuantizationType

KINDS = {"int8": Kind.Q8_0, "int4": Kind.Q4_0, "int4-affine": Kind.Q4_1}
_NAMES = {kind: name for name, kind in KINDS.items()}
BLOCK = 32


def fits(matrix: Quantized) -> bool:
    """Whether a matrix can be packed exactly."""
    stated = [matrix.scales] if matrix.minimums is None else [matrix.scales, matrix.minimums]
    exact = all(torch.equal(numbers.half().float(), numbers) for numbers in stated)
    return matrix.kind in KINDS and matrix.shape[1] % BLOCK == 0 and matrix.group % BLOCK == 0 and exact


def packed(matrix: Quantized) -> np.ndarray:
    """The bytes of a matrix that fits, uint8 [O, N * bytes of a block]."""
    n_out, n_in = matrix.shape
    n_blocks = n_in // BLOCK

    def halves(numbers: Tensor) -> np.ndarray:
        wide = numbers.repeat_interleave(matrix.group // BLOCK, dim=1)
        return wide.half().contiguous().view(torch.uint8).view(n_out, n_blocks, 2).numpy()

    parts = [halves(matrix.scales)]
    if matrix.minimums is not None:
        parts.append(halves(matrix.minimums))
    codes = matrix.indices().contiguous().view(torch.uint8).view(n_out, n_blocks, BLOCK).numpy()
    parts.append(codes if matrix.kind == "int8" else codes[:, :, :16] | codes[:, :, 16:] << 4)
    return np.concatenate(parts, axis=2).reshape(n_out, -1)


def unpacked(raw: np.ndarray, kind: Kind, shape: tuple[int, ...]) -> Quantized | None:
    """A matrix of a file's bytes; None for types and shapes that are multiplied out only."""
    if kind not in _NAMES or len(shape) != 2:
        return None
    blocks = raw.reshape(shape[0], shape[1] // BLOCK, -1)
    n_numbers = 2 if kind is Kind.Q4_1 else 1
    numbers = torch.from_numpy(blocks[:, :, : 2 * n_numbers].copy()).view(torch.float16).float()
    codes = blocks[:, :, 2 * n_numbers :]
    if kind is not Kind.Q8_0:
        codes = np.concatenate([codes & 15, codes >> 4], axis=2)
    indices = torch.from_numpy(codes.reshape(shape).copy()).view(torch.int8)
    least = numbers[:, :, 1].contiguous() if kind is Kind.Q4_1 else None
    return from_indices(_NAMES[kind], indices, numbers[:, :, 0].contiguous(), least)
