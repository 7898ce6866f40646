"""A matrix held as small integers with scales: what quantisation makes, files store, and the engine multiplies by.

Every format is one formula. The inputs of a row are cut into groups of equal length, and in a group with scale s (and,
where there is one, a minimum m) a code c stands for

    w = s * level(c) + m

In eight bits level(c) is c itself, from -127 to 127. In four bits it is an entry of a table of 16 that the whole
matrix shares: -8 to 7 (int4), 0 to 15 with a minimum for each group (GGUF's Q4_1), or NF4's quantiles.
Scales have at most eight significant bits where this package chose them, so bf16 and fp16 hold them exactly.

Shapes: O outputs, I inputs of a matrix [O, I], G groups in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arriero.quant import nf4

UNIFORM = tuple(float(level) for level in range(-8, 8))
FROM_ZERO = tuple(float(level) for level in range(16))
LEVELS = {"int4": UNIFORM, "int4-affine": FROM_ZERO, "nf4": nf4.LEVELS}
BITS = {"int8": 8, "int4": 4, "int4-affine": 4, "nf4": 4}
_AT_ONCE = 1 << 20  # values that are multiplied out together, so that temporaries stay small


@dataclass(frozen=True)
class Quantized:
    """A matrix [O, I] in few bits.

    kind: a name in `LEVELS`, or "int8". codes: int8 [O, I]; of four bits uint8 [O, I / 2], input 2j of a row in the low
    half of its byte j. scales: fp32 [O, G]. minimums: fp32 [O, G], for "int4-affine" alone.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return len(self.codes), self.codes.shape[1] * (8 // BITS[self.kind])

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def levels(self) -> tuple[float, ...] | None:
        """What the 16 codes of four bits stand for; None where codes are the numbers themselves."""
        return LEVELS.get(self.kind)

    def indices(self) -> Tensor:
        """The codes one by one [O, I], int8: in four bits from 0 to 15."""
        if BITS[self.kind] == 8:
            return self.codes
        return torch.stack([self.codes & 15, self.codes >> 4], dim=2).view(len(self.codes), -1).to(torch.int8)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [O, I]: the formula in fp32, rounded once to `dtype`."""
        n_out, n_in = self.shape
        out = torch.empty(n_out, n_in, dtype=dtype, device=self.codes.device)
        step = max(1, _AT_ONCE // n_in)
        for start in range(0, n_out, step):
            rows = self.rows(start, min(start + step, n_out))
            values = rows.indices()
            if self.levels is not None:
                values = torch.tensor(self.levels, device=values.device)[values.int()]
            groups = values.float().view(-1, self.scales.shape[1], self.group) * rows.scales[:, :, None]
            if rows.minimums is not None:
                groups += rows.minimums[:, :, None]
            out[start : start + step] = groups.view(-1, n_in)
        return out

    def rows(self, start: int, stop: int) -> Quantized:
        """Some of the rows."""
        least = None if self.minimums is None else self.minimums[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], minimums=least)

    def take(self, order: Tensor) -> Quantized:
        """The rows in another order."""
        least = None if self.minimums is None else self.minimums[order]
        return replace(self, codes=self.codes[order], scales=self.scales[order], minimums=least)


def from_indices(kind: str, indices: Tensor, scales: Tensor, minimums: Tensor | None = None) -> Quantized:
    """A matrix of codes one by one [O, I]: integers from -127 to 127, or in four bits from 0 to 15."""
    if BITS[kind] == 8:
        return Quantized(kind, indices.to(torch.int8), scales.float())
    pairs = indices.to(torch.uint8).view(len(indices), -1, 2)
    return Quantized(kind, pairs[:, :, 0] | pairs[:, :, 1] << 4, scales.float(), minimums)
