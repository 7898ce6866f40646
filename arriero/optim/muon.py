"""torch's Muon on CPUs that have no instructions for bf16 (quant/products.py).

torch.optim.Muon orthogonalises in bf16 and leaves no choice; its products are then some twenty times as slow as fp32's.
Here the same step runs in fp32. Twin: torch.optim.Muon, of which this differs by bf16's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Muon


class WideMuon(Muon):
    """Muon (arXiv 2502.16982) whose five Newton-Schulz iterations are in fp32; updates of AdamW's size (section 2.2).

    State as torch's, `momentum_buffer`, so either goes on with the other's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            assert group["nesterov"] and group["adjust_lr_fn"] == "match_rms_adamw"
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, beta = self.state[p], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - beta)
                update = orthogonalised(p.grad.lerp(buffer, beta), group["ns_coefficients"], group["ns_steps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """The nearest semi-orthogonal matrix, singular values within about 0.5 to 1.5; [m, n] as given, fp32.

    X = M / |M|; then `steps` times X <- a X + (b X X^T + c (X X^T)^2) X, on the side with the smaller Gram matrix.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().T if tall else matrix.float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
