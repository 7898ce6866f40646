"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + s B A x with W frozen and A, B small.

A wrapped linear keeps its weight under its own name and gains `lora_A.weight` and `lora_B.weight`, so the
state dict stays a Hugging Face checkpoint plus PEFT's adapter keys without their prefix.
Price at rank r: r*(in + out) parameters a linear; for SmolLM2-135M at rank 16 on all linears 4.9 M, 3.6%.

Shapes: in, out widths of the wrapped linear; r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.errors import ConfigError
from arriero.model.initial import initial_adapter, whole
from arriero.model.llama import Linear
from arriero.model.lora_config import LINEARS, LoraConfig

M = TypeVar("M", bound=nn.Module)


class LoraLinear(Linear):
    """y = x W^T + s * dropout(x) A^T B^T; W [out, in] frozen, A [r, in], B [out, r] trained in fp32."""

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", None)
        self.scale, self.dropout = scale, dropout
        device = base.weight.device
        self.lora_A = Linear(self.in_features, rank).to(device, torch.float32)
        self.lora_B = Linear(rank, self.out_features).to(device, torch.float32)
        self.train(base.training)  # a model for use stays one: no dropout

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A(F.dropout(x, self.dropout, self.training) if self.dropout else x)
        return super().forward(x) + self.lora_B(low) * self.scale

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s B A, fp32 [out, in]: what merging adds to the weight."""
        return self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    @torch.no_grad()
    def merged(self) -> Linear:
        """A plain linear with W + s B A, added in fp32 and rounded once to W's type."""
        with torch.device("meta"):
            plain = Linear(self.in_features, self.out_features)
        plain.weight = nn.Parameter((self.weight.float() + self.delta()).to(self.weight.dtype), requires_grad=False)
        return plain


def add_lora(model: M, config: LoraConfig, seed: int = 0) -> M:
    """Freeze the model and wrap the linears that `config.targets` names, in place; returns the model.

    seed: of the adapter's first values (`initial_adapter`), which on the meta device are left to come. Raises
    `ConfigError` when a target matches no linear, or the model is adapted already.
    """
    head = getattr(model, "head", None)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m is not head}
    if any(isinstance(m, LoraLinear) for m in linears.values()):
        raise ConfigError("lora: the model carries an adapter already; merge it first (arriero merge)")
    for target in config.targets:
        if target != "all-linear" and not any(n == target or n.endswith("." + target) for n in linears):
            raise ConfigError(
                f"lora: target {target!r} matches no linear; known are {', '.join(LINEARS)} and 'all-linear'"
            )
    model.requires_grad_(False)
    for name, linear in linears.items():
        if config.matches(name):
            rank = config.rank_pattern.get(name, config.rank)
            scale = config.scale(rank, config.alpha_pattern.get(name, config.alpha))
            _replace(model, name, LoraLinear(linear, rank, scale, config.dropout))
    for name, p in lora_state(model).items():
        if not p.is_meta:
            p.data.copy_(initial_adapter(name, p.shape, whole(p.shape), seed=seed))
    return model


def merge_lora(model: M) -> M:
    """Fold every adapter into its weight, in place; returns the model with plain linears."""
    for name, wrapped in list(_wrapped(model)):
        _replace(model, name, wrapped.merged())
    return model


def merged_copy(model: M) -> M:
    """The model with adapters folded, sharing every tensor that has none; the model itself when it has none."""
    if next(_wrapped(model), None) is None:
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return merge_lora(copy.deepcopy(model, memo=shared))


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by full name: `...q_proj.lora_A.weight` [r, in] and `...lora_B.weight` [out, r]."""
    return {name: p for name, p in model.named_parameters() if is_adapter(name)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def _wrapped(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
