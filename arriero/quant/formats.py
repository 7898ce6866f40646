"""The number formats by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.quant import int8, nf4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """How a matrix is held: its codes' type, the shapes of codes and scales, and the way there and back."""

    codes: torch.dtype
    shapes: Callable[[Sequence[int]], tuple[Shape, Shape]]
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor, Sequence[int], torch.dtype], Tensor]

    def rounded(self, weight: Tensor) -> Tensor:
        """The matrix as this format holds it, in its own type: there and back."""
        return self.dequantize(*self.quantize(weight), tuple(weight.shape), weight.dtype)


FORMATS = {
    "int8": Format(torch.int8, int8.shapes, int8.quantize, int8.dequantize),
    "nf4": Format(torch.uint8, nf4.shapes, nf4.quantize, nf4.dequantize),
}
