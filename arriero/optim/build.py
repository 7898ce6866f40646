"""From settings to an optimizer: AdamW, or Muon on the matrices inside the blocks with AdamW on everything else.

Muon (arXiv 2502.16982) replaces a matrix's momentum by the nearest semi-orthogonal matrix, so that all directions are
learned at one speed; its updates are scaled to the size of AdamW's (section 2.2 there), so one learning rate and one
weight decay serve both. Embeddings, head and norms are no maps between hidden states and stay with AdamW.
Price: five Newton-Schulz iterations a matrix and step, about 30 m^2 n FLOPs for m x n with m <= n, in bf16; it keeps
one moment for a matrix where AdamW keeps two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from arriero.optim.groups import decay_groups

Name = Literal["adamw", "muon"]


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
    in_blocks = {n: p for n, p in parameters.items() if p.ndim == 2 and ".layers." in n} if name == "muon" else {}
    rest = {n: p for n, p in parameters.items() if n not in in_blocks}
    adamw = AdamW(decay_groups(rest, weight_decay), lr=lr, betas=betas, eps=eps, fused=True) if rest else None
    if not in_blocks:
        assert adamw is not None, "there is nothing to train"
        return adamw
    muon = Muon(in_blocks.values(), lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return muon if adamw is None else Together(muon, adamw)


class Together(Optimizer):
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
