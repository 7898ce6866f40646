"""Finds the matrices that four bits hurt most, to be held in eight as far as a budget of bytes allows.

A unit is what shares its inputs (q, k and v; gate and up; o; down; the head), since vLLM multiplies those together and
wants them alike. One unit of a layer at a time is rounded to int4, nearest codes, and the layer is run on a text: how
much its output, the residual stream, moves, squared and relative to the stream, is what the unit costs. (The head: its
logits, around their mean.) Units are widened in the order of cost per byte that widening takes.
Price: five runs of each layer over some thousand tokens; one layer in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from arriero.checkpoint.layers import block_of, embedded, normed, run
from arriero.checkpoint.weights import Weights
from arriero.model.llama import HEAD
from arriero.quant.rounding import nearest

_UNITS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_ROWS = 4  # of the calibration text


@torch.no_grad()
def costs(
    weights: Weights, kinds: Mapping[str, str], rows: Tensor, said: Callable[[str], None] = lambda text: None
) -> dict[tuple[str, ...], float]:
    """Units, by the names of their matrices, and what int4 costs each; of the matrices in `kinds` only."""
    config, found = weights.config, dict[tuple[str, ...], float]()
    [x] = embedded(weights, [rows[:_ROWS]])
    for layer in range(config.n_layers):
        said(f"what four bits cost layer {layer + 1} of {config.n_layers}")
        block = block_of(config, layer, weights.read)
        exact = run(block, config, layer, x)
        parameters = {f"model.layers.{layer}.{name}": p for name, p in block.named_parameters()}
        for ends in _UNITS:
            unit = tuple(n for n in parameters if n in kinds and n.removesuffix(".weight").endswith(ends))
            whole = {name: parameters[name].clone() for name in unit}
            for name in unit:
                parameters[name].copy_(nearest(whole[name], "int4").dense())
            moved = run(block, config, layer, x) - exact
            for name in unit:
                parameters[name].copy_(whole[name])
            if unit:
                found[unit] = float(moved.square().sum() / exact.square().sum())
        x = exact
    if HEAD in kinds:
        head, states = weights.read(HEAD).float(), normed(weights, x).flatten(0, 1)[::8]
        logits = states @ head.T
        moved = states @ (nearest(head, "int4").dense() - head).T
        found[HEAD,] = float(moved.var(1).sum() / logits.var(1).sum())
    return found


def widened(
    found: Mapping[tuple[str, ...], float], kinds: Mapping[str, str], room: int, extra: Callable[[str], int]
) -> dict[str, str]:
    """`kinds` with int8 for the units that gain most by the byte; room: bytes. extra(name): what a matrix takes."""
    out = dict(kinds)
    prices = {unit: sum(map(extra, unit)) for unit in found}
    for unit in sorted(found, key=lambda unit: -found[unit] / prices[unit]):
        if prices[unit] <= room:
            room -= prices[unit]
            out |= dict.fromkeys(unit, "int8")
    return out
