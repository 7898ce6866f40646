"""Rounding to the nearest code, with the scale of each group chosen for the least squared error.

For a group of weights w and a scale s the codes are c = round(w / s), cut off at the ends. Several scales are tried:
those that put the largest magnitude at the last code or somewhat beyond, of either sign (-8 is a code and 8 is none,
so the sign matters). With the codes of each, s = <w, c> / <c, c> is the best scale, after which the codes are rounded
anew; the scale with the least sum of v (w - s c)^2 is kept. v are importances of the inputs, all alike if not given.

Scales are rounded to eight significant bits, and the codes belong to the rounded scale: bf16 files (compressed-tensors)
and fp16 files (GGUF) hold the same numbers. Price: 10 passes over the weights.

Shapes: N groups, g weights in a group; O outputs, I inputs of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.quant import nf4
from arriero.quant.packed import Quantized, from_indices

GROUP = {"int4": 32, "nf4": nf4.BLOCK}  # inputs that share a scale; in int8 all of a row
LIMITS = {"int8": (-127, 127), "int4": (-8, 7)}
# The code (with a fraction) that the largest magnitude is put at: beyond the last one it is cut off. With eight bits
# cutting off never gains.
_AIMS = {"int8": (127.0,), "int4": (-8.0, -8.6, -7.4, -9.3, 7.0, 7.6, 8.4)}
_AT_ONCE = 1 << 21  # weights that are tried together, so that temporaries stay small
_TINY = 2.0**-14  # below it fp16 has fewer than eight bits; a scale so small is kept, and only its rounding coarser


def short(scales: Tensor) -> Tensor:
    """fp32 rounded to what bf16 and fp16 both hold: eight significant bits, and no finer than 2^-24."""
    rounded = scales.to(torch.bfloat16).float()
    return torch.where(rounded.abs() < _TINY, rounded.to(torch.float16).float(), rounded)


@torch.no_grad()
def best_scales(groups: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """The scale [N] of each group [N, g] that its nearest codes fit best; importance: of the weights, as `groups`."""
    low, high = LIMITS[kind]
    rows = torch.arange(len(groups), device=groups.device)
    extreme = groups[rows, groups.abs().argmax(1)]
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    weights = torch.ones((), device=groups.device) if importance is None else importance
    for aim in _AIMS[kind]:
        scales = extreme / aim
        codes = _codes(groups, scales, low, high)
        under = (weights * codes * codes).sum(1)
        fitted = (weights * codes * groups).sum(1) / torch.where(under == 0, 1.0, under)
        fitted = short(torch.where(under == 0, scales, fitted))
        error = (weights * (groups - _codes(groups, fitted, low, high) * fitted[:, None]).square()).sum(1)
        better = error < least
        best, least = torch.where(better, fitted, best), torch.where(better, error, least)
    return best


def _codes(groups: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    return (groups / torch.where(scales == 0, 1.0, scales)[:, None]).round_().clamp_(low, high)


@torch.no_grad()
def nearest(weight: Tensor, kind: str, importance: Tensor | None = None) -> Quantized:
    """The matrix [O, I] in the nearest codes of `kind` ("int8", "int4" or "nf4"); importance: of each input [I]."""
    if kind == "nf4":
        return _nearest_nf4(weight)
    n_out, n_in = weight.shape
    low, high = LIMITS[kind]
    group = GROUP.get(kind, n_in)
    parts = []
    step = max(1, _AT_ONCE // n_in)
    for start in range(0, n_out, step):
        groups = weight[start : start + step].float().reshape(-1, group)
        weights = None if importance is None else importance.view(-1, group).repeat(len(groups) * group // n_in, 1)
        scales = best_scales(groups, kind, weights)
        codes = _codes(groups, scales, low, high) - (low if kind == "int4" else 0)
        parts.append((codes.view(-1, n_in).to(torch.int8), scales.view(-1, n_in // group)))
    codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    return from_indices(kind, codes, scales)


def _nearest_nf4(weight: Tensor) -> Quantized:
    codes, scales = nf4.quantize(weight.float())
    swapped = (codes >> 4 | codes << 4).view(len(weight), -1)  # QLoRA has the first of two in the high half
    return Quantized("nf4", swapped, scales.view(len(weight), -1))
