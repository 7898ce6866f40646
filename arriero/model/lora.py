"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + s B A x with W frozen and A, B small.

Any linear of the decoder may be adapted, whatever its weight is held in. A model may carry several adapters by name, of
which one acts, or none, or, for serving, another for each sequence (`use_adapter`). The one that is trained or loaded
without a name is `DEFAULT`.
Price at rank r: r*(in + out) parameters a linear; for SmolLM2-135M at rank 16 on all linears 4.9 M, 3.6%.

Names: in the module tree an adapted linear has `base.weight`, `lora_A.NAME.weight` and `lora_B.NAME.weight`; in files,
and wherever parameters are named, it is `weight`, `lora_A.weight` and `lora_B.weight` (`plain_name`), so a state dict
of Hugging Face's and PEFT's keys.

Shapes: in, out widths of the wrapped linear; r rank; B sequences.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.errors import ConfigError
from arriero.model.initial import initial_adapter, whole
from arriero.model.linear import Gather, Linear, Product, as_it_is, named_products, plain, replace_linears
from arriero.model.lora_config import LINEARS, LoraConfig
from arriero.quant.products import computed_in, is_plain

M = TypeVar("M", bound=nn.Module)

DEFAULT = "default"
Active = str | None | tuple[str | None, ...]
"""The adapter that acts; None: none of them; a tuple: one, or none, for each sequence."""


class LoraLinear(nn.Module):
    """y = base(x) + s * dropout(x) A^T B^T of the active adapter; A [r, in] and B [out, r] in fp32, the base frozen."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        assert isinstance(base, Product)
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.dropouts: dict[str, float] = {}
        self.active: Active = None
        self.train(base.training)  # a model for use stays one: no dropout

    def add(self, name: str, rank: int, scale: float, dropout: float, device: torch.device) -> None:
        """Carry one more adapter, which acts from now on."""
        self.lora_A[name] = Linear(self.in_features, rank).to(device, torch.float32).train(self.training)
        self.lora_B[name] = Linear(rank, self.out_features).to(device, torch.float32).train(self.training)
        self.scales[name], self.dropouts[name] = scale, dropout
        self.active = name

    def remove(self, name: str) -> None:
        """Carry that adapter no more, if it does; none acts now."""
        if name in self.scales:
            del self.lora_A[name], self.lora_B[name], self.scales[name], self.dropouts[name]
        self.active = None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.active, tuple):
            return self._each_with_its_own(x, self.active)
        if self.active is None or self.active not in self.scales:
            return self.base(x)  # type: ignore[no-any-return]
        dropped = self.dropouts[self.active] > 0 and self.training
        fused = not dropped and not torch.compiler.is_compiling()  # which fuses the passes itself
        if fused and (whole := self._plain(self.active)) is not None:
            y: Tensor = _Adapted.apply(x, *whole, self.scales[self.active])  # type: ignore[no-untyped-call]
            return y
        low = self._down(self.active, x)  # before the base: gradients are then added up in the same order as ever
        return self.base(x) + self._up(self.active, low)  # type: ignore[no-any-return]

    def _plain(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """W, A and B where each is a tensor that lies here whole, and W is frozen."""
        if type(self.base) is not Linear or self.base.weight.requires_grad:
            return None
        found = self.base.weight, self.lora_A[name].weight, self.lora_B[name].weight
        return found if all(map(is_plain, found)) else None  # type: ignore[arg-type,return-value]

    def _each_with_its_own(self, x: Tensor, active: tuple[str | None, ...]) -> Tensor:
        """x is [B, T, in]: the sequences of each adapter together."""
        y: Tensor = self.base(x)
        for name in dict.fromkeys(active):
            if name is not None and name in self.scales:
                rows = torch.tensor([i for i, other in enumerate(active) if other == name], device=x.device)
                y = y.index_add(0, rows, self._up(name, self._down(name, x[rows])).to(y.dtype))
        return y

    def _down(self, name: str, x: Tensor) -> Tensor:
        dropout = self.dropouts[name]
        low: Tensor = self.lora_A[name](F.dropout(x, dropout, self.training) if dropout else x)
        return low

    def _up(self, name: str, low: Tensor) -> Tensor:
        product: Tensor = self.lora_B[name](low) * self.scales[name]
        return product

    @property
    def dtype(self) -> torch.dtype:
        """The base's."""
        dtype = self.base.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @torch.no_grad()
    def delta(self, whole: Gather = as_it_is) -> Tensor:
        """s B A of the active adapter, fp32 [out, in]: what merging adds to the weight."""
        name = self._acting()
        assert name is not None
        a, b = self.lora_A[name], self.lora_B[name]
        assert isinstance(a, Linear) and isinstance(b, Linear)
        return self.scales[name] * (whole(b.weight).float() @ whole(a.weight).float())

    @torch.no_grad()
    def dense(self, whole: Gather = as_it_is) -> Tensor:
        """W + s B A of the active adapter, added in fp32 and rounded once to W's type."""
        weight: Tensor = self.base.dense(whole)
        return weight if self._acting() is None else (weight.float() + self.delta(whole)).to(weight.dtype)

    def _acting(self) -> str | None:
        """The adapter that acts on this linear."""
        if isinstance(self.active, tuple):
            raise ValueError("each sequence has an adapter of its own, so there is no one matrix; use one adapter")
        return self.active if self.active in self.scales else None


class _Adapted(torch.autograd.Function):
    """x W^T + s (x A^T) B^T with W frozen, in the type of x; twin: the products one by one, in `LoraLinear.forward`.

    The low-rank product is added by the product itself, and scaled where it is narrow, in both directions: four passes
    less over outputs. A step's linears take 15% less time so (SmolLM2-135M at rank 16, one core), and more where
    products of bf16 are widened (quant/products.py), which is then done once for x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dtype = x.dtype
        wide = computed_in(dtype, x.device)
        rows, narrow_a, narrow_b = x.reshape(-1, x.shape[-1]), a.to(dtype), b.to(dtype)
        of_x = rows.to(wide)
        low = (of_x @ narrow_a.to(wide).T) * scale
        y = torch.addmm(of_x @ weight.to(dtype).to(wide).T, low, narrow_b.to(wide).T)
        ctx.save_for_backward(rows, weight, narrow_a, narrow_b, low)
        ctx.scale, ctx.wide, ctx.types = scale, wide, (a.dtype, b.dtype)
        return y.to(dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        dtype, wide = rows.dtype, ctx.wide
        grad = gradient.reshape(-1, gradient.shape[-1]).to(wide)
        of_low = (grad @ b.to(wide)) * ctx.scale
        of_a, of_b = (of_low.T @ rows.to(wide)).to(ctx.types[0]), (grad.T @ low).to(ctx.types[1])
        if not ctx.needs_input_grad[0]:
            return None, None, of_a, of_b, None
        of_x = torch.addmm(grad @ weight.to(dtype).to(wide), of_low, a.to(wide)).to(dtype)
        return of_x.view(*gradient.shape[:-1], -1), None, of_a, of_b, None


def add_lora(model: M, config: LoraConfig, seed: int = 0, *, name: str = DEFAULT) -> M:
    """Freeze the model and adapt the linears that `config.targets` names, in place; returns the model.

    name: of the adapter, which acts from now on. seed: of its first values (`initial_adapter`), which on the meta
    device are left to come. Raises `ConfigError` when a target matches no linear, or there is an adapter of that name.
    """
    linears = dict(named_products(model))
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"lora: an adapter's name is {name!r}; it may have letters, digits, _ and -")
    if name in adapters(model):
        raise ConfigError(
            f"lora: the model carries an adapter {name!r} already; merge it first (arriero merge), or give another name"
        )
    for target in config.targets:
        if target != "all-linear" and not any(n == target or n.endswith("." + target) for n in linears):
            raise ConfigError(
                f"lora: target {target!r} matches no linear; known are {', '.join(LINEARS)} and 'all-linear'"
            )
    model.requires_grad_(False)

    def adapted(linear: str, module: nn.Module) -> nn.Module | None:
        if not config.matches(linear):
            return None
        device = next(module.parameters(), next(module.buffers(), torch.empty(0))).device
        wrapped = module if isinstance(module, LoraLinear) else LoraLinear(module)
        rank = config.rank_pattern.get(linear, config.rank)
        scale = config.scale(rank, config.alpha_pattern.get(linear, config.alpha))
        wrapped.add(name, rank, scale, config.dropout, device)
        return wrapped

    replace_linears(model, adapted)
    use_adapter(model, name)
    for tensor, p in lora_state(model, name).items():
        if not p.is_meta:
            p.data.copy_(initial_adapter(tensor, p.shape, whole(p.shape), seed=seed))
    return model


def remove_lora(model: nn.Module, name: str) -> None:
    """Drop the adapter of that name; none acts until the next `use_adapter`. Linears without any stay wrapped."""
    for module in _wrapped(model):
        module.remove(name)


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that the model carries."""
    return list(dict.fromkeys(name for module in _wrapped(model) for name in module.lora_A))


def use_adapter(model: nn.Module, active: Active | Sequence[str | None]) -> None:
    """Let the adapter of that name act, or none, or one for each sequence of the batches to come.

    Raises `ConfigError` for an adapter that the model does not carry.
    """
    active = active if active is None or isinstance(active, str) else tuple(active)
    known = adapters(model)
    for name in (active,) if not isinstance(active, tuple) else active:
        if name is not None and name not in known:
            raise ConfigError(f"the model carries no adapter {name!r}; it has {', '.join(known) or 'none'}")
    for module in _wrapped(model):
        module.active = active


@contextmanager
def using_adapter(model: nn.Module, active: Active | Sequence[str | None]) -> Iterator[None]:
    """`use_adapter` while the block runs; afterwards what acted before acts again."""
    before = [(module, module.active) for module in _wrapped(model)]
    use_adapter(model, active)
    try:
        yield
    finally:
        for module, was in before:
            module.active = was


@torch.no_grad()
def merged_copy(model: M) -> M:
    """The model with the adapter that acts folded into the linears that have one, whatever else those are held in.

    It shares every other tensor, but no parameter: nothing done to one can freeze the other. Without adapters: itself.
    """

    def folded(_: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, LoraLinear):
            return None
        return module.base if module._acting() is None else plain(module)

    return replace_linears(sharing_copy(model), folded) if adapters(model) else model


def sharing_copy(model: M) -> M:
    """Other modules and frozen parameters around the same memory."""
    frozen: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo=frozen | {id(b): b for b in model.buffers()})


def lora_state(model: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """An adapter's tensors by full name: `...q_proj.lora_A.weight` [r, in] and `...lora_B.weight` [out, r]."""
    return {
        full.replace(f".{name}.weight", ".weight"): p
        for full, p in model.named_parameters()
        if is_adapter(full) and full.endswith(f".{name}.weight")
    }


def plain_name(name: str) -> str:
    """A parameter's name without what wraps it: that of Hugging Face's and PEFT's files."""
    return name.replace(".base.", ".").replace(f".{DEFAULT}.weight", ".weight")


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def _wrapped(model: nn.Module) -> Iterator[LoraLinear]:
    return (module for module in model.modules() if isinstance(module, LoraLinear))
