"""Linears whose weight is held in few bits (quant/) and multiplied out as it is used: the frozen base of QLoRA.

The dense weight lives for one product only: the backward pass multiplies it out again, so that what is kept for it are
the codes. Price: one pass over the weight for each product, twice a step; a block's matrix lies in memory twice while
it is multiplied by.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from arriero.model.linear import Gather, Linear, as_it_is, replace_linears
from arriero.quant.formats import FORMATS
from arriero.quant.products import linear, product

M = TypeVar("M", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """y = x W^T, computed in the type of x; W [out, in] held as codes and scales of a format, never trained.

    dtype: what W counts as, and is rounded to where it is written as a dense matrix.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind, self.dtype = in_features, out_features, kind, dtype
        codes, scales = FORMATS[kind].shapes((out_features, in_features))
        self.register_buffer("codes", torch.empty(codes, dtype=FORMATS[kind].codes))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32))

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Hold this matrix: on the device that the codes are on."""
        codes, scales = FORMATS[self.kind].quantize(weight.to(self.codes.device))
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def dense(self, whole: Gather = as_it_is) -> Tensor:
        """W as it is held, in `dtype`."""
        shape = self.out_features, self.in_features
        return FORMATS[self.kind].dequantize(whole(self.codes), whole(self.scales), shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.codes, self.scales, self.kind, self.out_features)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    """x W^T, and for the gradient g W, W multiplied out each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, kind: str, out_features: int) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.kind, ctx.shape, ctx.dtype = kind, (out_features, x.shape[-1]), x.dtype
        return linear(x, FORMATS[kind].dequantize(codes, scales, ctx.shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        weight = FORMATS[ctx.kind].dequantize(codes, scales, ctx.shape, ctx.dtype)
        return product(gradient, weight), None, None, None, None


def quantize_linears(model: M, kind: str) -> M:
    """Hold the matrices of the blocks in `kind`, in place; embeddings, norms and head stay as they are.

    On the meta device nothing is multiplied: the codes come when the model is given its values.
    """

    def quantized(_: str, module: nn.Module) -> nn.Module | None:
        if type(module) is not Linear:
            return None
        weight = module.weight
        with weight.device:
            other = QuantizedLinear(module.in_features, module.out_features, kind, weight.dtype)
        if not weight.is_meta:
            other.fill(weight)
        return other.train(module.training)

    return replace_linears(model, quantized)
