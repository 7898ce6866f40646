"""Rounding that knows what the matrix multiplies: least error of the outputs, not of the weights.

With inputs x of some text and H = sum x x^T, rounding W to W' costs the outputs tr((W - W') H (W - W')^T). Each row
is a problem of its own:

1. Codes one input after the other, the error of each passed on to the inputs that follow (GPTQ, arXiv 2210.17323), with
   a scale for each group when its turn comes (rounding.py, inputs weighted by what an error there costs).
2. Scales anew: with the codes given, the best scales of a row solve a system of G equations.
3. Codes anew, by coordinate descent: each code takes its best value, the others given; in order, some times over. 2 and
   3 are repeated; neither can raise the error but for rounding scales to eight bits.

Price: 1 and each pass of 2 and 3 multiply O I^2 times; H is I x I in fp32.

Shapes: O outputs, I inputs of a matrix [O, I], G groups of g inputs in a row. Within, matrices lie by inputs [I, O], so
that the numbers of one input lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from arriero.quant.packed import Quantized, from_indices
from arriero.quant.rounding import GROUP, LIMITS, best_scales, short

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that the text never used stay near their weights
_ROUNDS = 3  # of scales and codes anew
_AT_ONCE = 1 << 23  # numbers of a temporary
_BLOCK = 64  # inputs whose errors are passed on to all that follow together


@torch.no_grad()
def calibrated(weight: Tensor, gram: Tensor, kind: str, rounds: int = _ROUNDS) -> Quantized:
    """The matrix [O, I] in codes of `kind` ("int8" or "int4"), for inputs whose sum of x x^T is `gram` [I, I]."""
    gram = damped(gram)
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    rows = max(64, _AT_ONCE // weight.shape[1])
    with _one_thread():
        parts = [
            _rounded(weight[start : start + rows].float(), gram, spread, kind, rounds)
            for start in range(0, len(weight), rows)
        ]
    codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    low, _ = LIMITS[kind]
    return from_indices(kind, codes - (low if kind == "int4" else 0), scales)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products, one after the other: threads that wait for each other at each of them take ten times
    as long where cores are shared (docs/log.md), and gain little where they are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """Codes [O, I] and scales [O, G]."""
    n_in = weight.shape[1]
    group = GROUP.get(kind, n_in)
    wide = weight.T.contiguous()
    codes, scales = _in_turn(wide, spread, kind, group)
    for _ in range(rounds):
        scales = _best_scales(wide, codes, scales, gram, group)
        codes = _descended(wide, codes, scales, gram, kind)
    return codes.T.to(torch.int8), scales.T


def _in_turn(weight: Tensor, spread: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Codes [I, O] and scales [G, O] by GPTQ, in blocks of one group (int8: of some inputs).

    spread: the upper triangle U of H^-1 = U^T U.
    """
    low, high = LIMITS[kind]
    n_in, n_out = weight.shape
    left, codes = weight.clone(), torch.empty_like(weight)
    costs = spread.diagonal().square().reciprocal()
    scales = torch.empty(n_in // group, n_out)
    if group == n_in:
        scales[0] = best_scales(weight.T, kind)
    step = min(group, _BLOCK)
    for start in range(0, n_in, step):
        stop = min(start + step, n_in)
        if group != n_in:
            part = left[start:stop].T
            scales[start // group] = best_scales(part, kind, costs[start:stop].expand_as(part))
        scale = scales[start // group]
        divisor = torch.where(scale == 0, 1.0, scale)
        errors = torch.empty(stop - start, n_out)
        for i in range(start, stop):
            torch.clamp((left[i] / divisor).round_(), low, high, out=codes[i])
            error = torch.div(left[i] - codes[i] * scale, spread[i, i], out=errors[i - start])
            left[i:stop].addr_(spread[i, i:stop], error, alpha=-1)
        left[stop:].addmm_(spread[start:stop, stop:].T, errors, alpha=-1)
    return codes, scales


def _best_scales(weight: Tensor, codes: Tensor, scales: Tensor, gram: Tensor, group: int) -> Tensor:
    """The scales [G, O] of the least output error for these codes: C^T H C s = C^T H w for each row."""
    n_in, n_out = weight.shape
    n_groups = n_in // group
    grouped = codes.view(n_groups, group, n_out)
    system = torch.empty(n_groups, n_groups, n_out)
    for g in range(n_groups):
        sent = gram[:, g * group : (g + 1) * group] @ grouped[g]  # what group g sends to all inputs [I, O]
        torch.sum(sent.view(n_groups, group, n_out).mul_(grouped), 1, out=system[g])
    wanted = ((gram @ weight).view(n_groups, group, n_out) * grouped).sum(1)
    system = system.permute(2, 0, 1).contiguous()
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.mean(1, keepdim=True) * 1e-6 + 1e-20)
    solved = torch.linalg.solve(system, wanted.T).T
    return short(torch.where(solved.isfinite(), solved, scales))


def _descended(weight: Tensor, codes: Tensor, scales: Tensor, gram: Tensor, kind: str) -> Tensor:
    """Codes [I, O] after one pass in which each takes its best value, those before it new, those after it old."""
    low, high = LIMITS[kind]
    n_in = weight.shape[0]
    codes = codes.clone()
    group = n_in // len(scales)
    wide = scales.repeat_interleave(group, dim=0)
    difference = weight - codes * wide
    for start in range(0, n_in, _BLOCK):
        stop = min(start + _BLOCK, n_in)
        pull = gram[start:stop] @ difference  # [block, O]; kept true within the block as codes change
        for i in range(start, stop):
            scale = wide[i]
            dead = scale == 0
            best = (codes[i] + pull[i - start] / torch.where(dead, 1.0, scale * gram[i, i])).round_().clamp_(low, high)
            code = torch.where(dead, codes[i], best)
            change = (codes[i] - code) * scale
            codes[i] = code
            difference[i] += change
            pull.addr_(gram[i, start:stop], change)
    return codes
