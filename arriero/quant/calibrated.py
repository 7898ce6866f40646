"""Rounding that knows what the matrix multiplies: least error of the outputs, not of the weights.

With inputs x of some text and H = sum x x^T, rounding W to W' costs the outputs tr((W - W') H (W - W')^T). Each row
is a problem of its own:

1. Codes one input after the other, the error of each passed on to the inputs that follow (GPTQ, arXiv 2210.17323), with
   a scale for each group when its turn comes (rounding.py, inputs weighted by what an error there costs).
2. Scales anew: with the codes given, the best scales of a row solve a system of G equations.
3. Codes anew, by coordinate descent: each code takes its best value, the others given; in order, some times over. 2 and
   3 are repeated; neither can raise the error but for rounding scales to eight bits.

Price: 1 and each pass of 2 and 3 multiply O I^2 times; H is I x I in fp32.

Shapes: O outputs, I inputs of a matrix [O, I], G groups of g inputs in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.quant.packed import Quantized, from_indices
from arriero.quant.rounding import GROUP, LIMITS, best_scales, short

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that the text never used stay near their weights
_ROUNDS = 3  # of scales and codes anew
_AT_ONCE = 1 << 24  # numbers of a temporary


@torch.no_grad()
def calibrated(weight: Tensor, gram: Tensor, kind: str, rounds: int = _ROUNDS) -> Quantized:
    """The matrix [O, I] in codes of `kind` ("int8" or "int4"), for inputs whose sum of x x^T is `gram` [I, I]."""
    gram = damped(gram)
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    rows = max(64, _AT_ONCE // weight.shape[1])
    parts = [
        _rounded(weight[start : start + rows].float(), gram, spread, kind, rounds)
        for start in range(0, len(weight), rows)
    ]
    codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    low, _ = LIMITS[kind]
    return from_indices(kind, codes - (low if kind == "int4" else 0), scales)


def damped(gram: Tensor) -> Tensor:
    """H with a little added to its diagonal, as fp32."""
    gram = gram.float().clone()
    mean = gram.diagonal().mean()
    gram.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return gram


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """||W' X - W X|| / ||W X||: what rounding does to the outputs, of inputs whose sum of x x^T is `gram`."""

    def norm(matrix: Tensor) -> Tensor:
        return ((matrix @ gram.float()) * matrix).sum()

    return float((norm(rounded - weight) / norm(weight).clamp_min(1e-30)).clamp_min(0).sqrt())


def _rounded(weight: Tensor, gram: Tensor, spread: Tensor, kind: str, rounds: int) -> tuple[Tensor, Tensor]:
    n_in = weight.shape[1]
    group = GROUP.get(kind, n_in)
    codes, scales = _in_turn(weight, spread, kind, group)
    for _ in range(rounds):
        scales = _best_scales(weight, codes, scales, gram, group)
        codes = _descended(weight, codes, scales, gram, kind)
    return codes.to(torch.int8), scales


def _in_turn(weight: Tensor, spread: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O, G] by GPTQ, in blocks of one group (int8: of 128 inputs).

    spread: the upper triangle U of H^-1 = U^T U.
    """
    low, high = LIMITS[kind]
    n_out, n_in = weight.shape
    left, codes = weight.clone(), torch.empty_like(weight)
    costs = spread.diagonal().square().reciprocal()
    scales = torch.empty(n_out, n_in // group)
    if group == n_in:
        scales[:] = best_scales(weight, kind)[:, None]
    step = min(group, 128)
    for start in range(0, n_in, step):
        stop = min(start + step, n_in)
        if group != n_in:
            part = left[:, start:stop]
            scales[:, start // group] = best_scales(part, kind, costs[start:stop].expand_as(part))
        scale = scales[:, start // group]
        divisor = torch.where(scale == 0, 1.0, scale)
        errors = torch.empty(n_out, stop - start)
        for i in range(start, stop):
            code = (left[:, i] / divisor).round_().clamp_(low, high)
            codes[:, i] = code
            error = (left[:, i] - code * scale) / spread[i, i]
            left[:, i:stop] -= error[:, None] * spread[i, i:stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes, scales


def _best_scales(weight: Tensor, codes: Tensor, scales: Tensor, gram: Tensor, group: int) -> Tensor:
    """The scales [O, G] of the least output error for these codes: C^T H C s = C^T H w for each row."""
    n_out, n_in = weight.shape
    n_groups = n_in // group
    grouped = codes.view(n_out, n_groups, group)
    system = torch.empty(n_out, n_groups, n_groups)
    for g in range(n_groups):
        spread = grouped[:, g] @ gram[g * group : (g + 1) * group]  # what group g sends to all inputs [O, I]
        system[:, g] = (spread.view(n_out, n_groups, group) * grouped).sum(2)
    wanted = ((weight @ gram).view(n_out, n_groups, group) * grouped).sum(2)
    system.diagonal(dim1=1, dim2=2).add_(system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) * 1e-6 + 1e-20)
    solved = torch.linalg.solve(system, wanted)
    return short(torch.where(solved.isfinite(), solved, scales))


def _descended(weight: Tensor, codes: Tensor, scales: Tensor, gram: Tensor, kind: str) -> Tensor:
    """Codes after one pass in which each takes its best value, those before it new, those after it old."""
    low, high = LIMITS[kind]
    n_in = weight.shape[1]
    codes = codes.clone()
    wide = scales.repeat_interleave(n_in // scales.shape[1], dim=1)
    difference = weight - codes * wide
    step = 128
    for start in range(0, n_in, step):
        stop = min(start + step, n_in)
        pull = difference @ gram[:, start:stop]  # [O, step]; kept true within the block as codes change
        for i in range(start, stop):
            scale, here = wide[:, i], gram[i, i]
            best = codes[:, i] + pull[:, i - start] / (here * torch.where(scale == 0, 1.0, scale))
            code = torch.where(scale == 0, codes[:, i], best.round_().clamp_(low, high))
            change = (codes[:, i] - code) * scale
            codes[:, i] = code
            difference[:, i] += change
            pull += change[:, None] * gram[i, start:stop]
    return codes
