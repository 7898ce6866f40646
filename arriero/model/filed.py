"""Linears whose weight stays in its file until someone asks for it: what an engine is opened from.

The C++ step lays every matrix out anew, once, so a model that is loaded first is one copy too many. With these in the
place of its linears a model is its shape, its norms and its embeddings; each matrix is read when the step packs it, and
is not kept. `hold` makes ordinary linears of them, for whoever multiplies by them in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from arriero.model.linear import Gather, Linear, as_it_is, named_products
from arriero.model.llama import HEAD, Llama
from arriero.model.packed import PackedLinear
from arriero.quant.packed import Quantized
from arriero.quant.products import linear


class FiledLinear(nn.Module):
    """y = x W^T, W [out, in] read each time it is asked for: see the module.

    read: returns W, in `dtype` or in few bits, in memory of its own.
    """

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, read: Callable[[], Tensor | Quantized]):
        super().__init__()
        self.out_features, self.in_features, self.dtype, self.read = out_features, in_features, dtype, read

    @property
    def weight(self) -> Tensor:
        """W in `dtype`, read now."""
        return self.dense()

    @torch.no_grad()
    def dense(self, whole: Gather = as_it_is) -> Tensor:
        """W in `dtype`, read now."""
        found = self.read()
        return found.dense(self.dtype) if isinstance(found, Quantized) else found

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dense().to(x.dtype))

    def held(self) -> Linear | PackedLinear:
        """The linear that keeps its weight in memory."""
        found = self.read()
        if isinstance(found, Quantized):
            return PackedLinear(found, self.dtype)
        with torch.device("meta"):
            linear = Linear(self.in_features, self.out_features)
        linear.weight = nn.Parameter(found, requires_grad=False)
        return linear


def file_linears(model: Llama, read: Callable[[str], Tensor | Quantized], dtype: torch.dtype) -> Llama:
    """Replace the linears of the blocks, and a head of its own, in place. read: gives a weight by its name."""
    head = [] if model.tied else [(HEAD.removesuffix(".weight"), model.head)]
    for name, module in [*named_products(model), *head]:
        if isinstance(module, Linear):
            out, in_ = module.out_features, module.in_features
            _put(model, name, FiledLinear(out, in_, dtype, partial(read, f"{name}.weight")).train(module.training))
    return model


def hold(model: Llama) -> Llama:
    """Read all that is still in the file, in place; adapters stay around what they adapt."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FiledLinear):
            _put(model, name, module.held())
    return model


def _put(model: Llama, name: str, linear: nn.Module) -> None:
    if model.get_submodule(name) is model.head:
        model.set_head(linear)
    else:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
