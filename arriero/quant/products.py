"""Matrix products of bf16 on processors without instructions for them.

torch multiplies bf16 matrices at about 0.2 GFLOP/s on a CPU without AVX-512 (most laptops; other types of CPU alike):
hundreds of times slower than fp32, which would make the default precision of this library useless there. The product of
two bf16 matrices, added up in fp32 and rounded once, is what the instructions compute; here fp32 products of widened
copies compute the same. Weights, activations and gradients keep their type, and memory its size.

Price: a copy in fp32 of each operand while it is used; with hundreds of tokens, a few hundredths of the product's time.
Where the processor multiplies bf16 itself nothing is done here.
Twin: torch's own products (tests/quant/test_products.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def computed_in(dtype: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The type that products of `dtype` are computed in: itself, or fp32 where a CPU has no instructions for it."""
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if _multiplies(dtype) else torch.float32


def widened(x: Tensor) -> Tensor:
    """x in the type that its products are computed in."""
    return x.to(computed_in(x.dtype, x.device))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the type of x; x [..., in] and W [out, in] of one type, differentiable."""
    if computed_in(x.dtype, x.device) == x.dtype or not (is_plain(x) and is_plain(weight)):
        return F.linear(x, weight)
    y: Tensor = _Widened.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the type of a; without gradient where it is widened."""
    wide = computed_in(a.dtype, a.device)
    return a @ b if wide == a.dtype else (a.to(wide) @ b.to(wide)).to(a.dtype)


def is_plain(x: Tensor) -> bool:
    """Whether it is no subclass that computes in its own way, as a tensor that lies on many processes does."""
    return type(x) in (Tensor, nn.Parameter)


class _Widened(torch.autograd.Function):
    """Keeps the narrow operands for the backward pass, not the copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = gradient.float()
        of_x = (wide @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None
        return of_x, (wide.flatten(0, -2).T @ x.float().flatten(0, -2)).to(weight.dtype)


def _multiplies(dtype: torch.dtype) -> bool:
    return _NATIVE[dtype]


_NATIVE = {  # whether torch's library for CPUs (oneDNN) has products of a type here; found once, outside compiled code
    torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}
