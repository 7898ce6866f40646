"""The linear of the decoder, and the one function by which other modules replace it.

A module that replaces a `Linear` is a `Product`: a quantised weight (quantized.py), a linear with adapters (lora.py),
or both. Each can return its dense matrix, so that it can be merged, exported, or passed to code for plain linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from arriero.quant.products import linear

M = TypeVar("M", bound=nn.Module)


Gather = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor, which is whole here."""
    return tensor


@runtime_checkable
class Product(Protocol):
    """y = x W^T for some W [out, in], however it is held."""

    in_features: int
    out_features: int

    @property
    def dtype(self) -> torch.dtype:
        """What W counts as, however it is held."""

    def dense(self, whole: Gather = as_it_is) -> Tensor:
        """W in `dtype`: what a plain linear in this one's place would hold.

        whole: gathers each tensor that this one is made of, where they are split over processes.
        """


class Linear(nn.Linear):
    """y = x W^T, without bias, computed in the type of x; W [out, in] may be stored in a wider one."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The type that W is stored in."""
        return self.weight.dtype

    def dense(self, whole: Gather = as_it_is) -> Tensor:
        """W itself."""
        return whole(self.weight.detach())


def named_products(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears of the decoder, or what replaces them, by name; without the head."""
    head = getattr(model, "head", None)
    inside = "\0"  # what the last one begins with: the linears that it is made of come right behind it
    module: nn.Module
    for name, module in model.named_modules():
        if isinstance(module, Product) and module is not head and not name.startswith(inside):
            inside = name + "."
            yield name, model.get_submodule(name)


def replace_linears(model: M, replace: Callable[[str, nn.Module], nn.Module | None]) -> M:
    """Replace each linear of the decoder by `replace(name, linear)`, in place, unless that is None."""
    for name, module in list(named_products(model)):
        if (other := replace(name, module)) is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, other)
    return model


@torch.no_grad()
def densify(model: M) -> M:
    """Give every linear its dense weight, in place, the head too: adapters folded, quantised weights rounded."""
    head = getattr(model, "head", None)
    if isinstance(head, nn.Module) and type(head) is not Linear:
        model.set_head(plain(head))  # type: ignore[operator]
    return replace_linears(model, lambda _, module: None if type(module) is Linear else plain(module))


@torch.no_grad()
def plain(module: nn.Module) -> Linear:
    """A plain linear that multiplies by what `module` does."""
    assert isinstance(module, Product)
    with torch.device("meta"):
        dense = Linear(module.in_features, module.out_features)
    dense.weight = nn.Parameter(module.dense(), requires_grad=False)
    return dense
