"""Builds the optimizer that the settings ask for: AdamW, AdamW with 8-bit moments, or Muon on the blocks' matrices.

Muon (arXiv 2502.16982) replaces a matrix's momentum by the nearest semi-orthogonal matrix, so that all directions are
learned at one speed; its updates are scaled to the size of AdamW's (section 2.2 there), so one learning rate and one
weight decay serve both. Embeddings, head and norms do not map hidden states to hidden states and stay with AdamW.
Price: five Newton-Schulz iterations a matrix and step, about 30 m^2 n FLOPs for m x n with m <= n, in bf16 (in fp32 on
CPUs without it, muon.py); it keeps one moment for a matrix where AdamW keeps two. Eight bits (adamw8bit.py) are for
matrices; norms stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from arriero.optim.adamw8bit import AdamW8bit
from arriero.optim.muon import WideMuon
from arriero.quant.products import computed_in

Name = Literal["adamw", "adamw8bit", "muon"]


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    name: Name,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Optimizer:
    """The optimizer `name` over parameters by full name; norms are not decayed."""
    assert parameters, "there is nothing to train"
    matrices = {n: p for n, p in parameters.items() if p.ndim == 2}
    in_blocks = {n: p for n, p in matrices.items() if ".layers." in n}
    own: dict[str, nn.Parameter] = {"adamw": {}, "adamw8bit": matrices, "muon": in_blocks}[name]
    rest = {n: p for n, p in parameters.items() if n not in own}
    members: list[Optimizer] = []
    if own and name == "muon":
        device = next(iter(own.values())).device
        muon = Muon if computed_in(torch.bfloat16, device) == torch.bfloat16 else WideMuon
        members.append(
            muon(own.values(), lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    elif own:
        members.append(AdamW8bit(own.values(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
    if rest:
        members.append(AdamW(decay_groups(rest, weight_decay), lr=lr, betas=betas, eps=eps, fused=True))
    return members[0] if len(members) == 1 else CombinedOptimizer(*members)


def decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices are decayed, norms (vectors) are not."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def empty_state(parameter: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros to load optimizer state into: sharded like the parameter if it has as many rows, else replicated."""
    if len(shape) == parameter.ndim and shape[0] == parameter.shape[0]:
        like = parameter.detach() if tuple(shape) == tuple(parameter.shape) else parameter.detach()[:, : shape[1]]
        return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


class CombinedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters, used as one: the same groups, and one state for all."""

    def __init__(self, *members: Optimizer) -> None:
        super().__init__([p for member in members for group in member.param_groups for p in group["params"]], {})
        self.members = members
        self.param_groups = [group for member in members for group in member.param_groups]
        for member in members:
            member.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of each."""
        assert closure is None, "no optimizer here needs a closure"
        for member in self.members:
            member.step()
