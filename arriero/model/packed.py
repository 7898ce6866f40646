"""Linears that hold their weight as codes and scales (quant/packed.py), in models that are run, not trained.

The C++ step of the engine multiplies by the integers themselves; the forward in torch multiplies the weight out for
each product, so it is for measuring and for machines without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from arriero.model.linear import Gather, Linear, as_it_is, named_products
from arriero.model.llama import HEAD, Llama
from arriero.quant.packed import Quantized
from arriero.quant.products import linear


class PackedLinear(nn.Module):
    """y = x W^T, computed in the type of x; W [out, in] held as a `Quantized` matrix, never trained.

    dtype: what W counts as, and is rounded to where it is multiplied out.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    def __init__(self, matrix: Quantized, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = matrix.kind, dtype
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("minimums", matrix.minimums)

    @property
    def matrix(self) -> Quantized:
        """W as it is held."""
        return Quantized(self.kind, self.codes, self.scales, self.minimums)

    @property
    def weight(self) -> Tensor:
        """W in `dtype`, multiplied out anew each time."""
        return self.dense()

    def dense(self, whole: Gather = as_it_is) -> Tensor:
        """W in `dtype`."""
        return self.matrix.dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix.dense(x.dtype))


@torch.no_grad()
def pack_linears(model: Llama, packed: Callable[[str, Tensor], Quantized | None]) -> Llama:
    """Hold the linears of the blocks, and the head, as `packed(name, weight)` gives them, in place; None: as they are.

    A head that was the embeddings becomes a matrix of its own.
    """
    for name, module in [*named_products(model), (HEAD.removesuffix(".weight"), model.head)]:
        if type(module) is not Linear or (matrix := packed(f"{name}.weight", module.weight)) is None:
            continue
        linear = PackedLinear(matrix, module.weight.dtype).train(module.training)
        if module is model.head:
            untie(model)
            model.set_head(linear)
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


def untie(model: Llama) -> None:
    """Let the head be a matrix of its own, in what the model says of itself."""
    model.config = model.model.config = replace(model.config, tied_embeddings=False)
