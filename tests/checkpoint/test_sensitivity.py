"""What four bits cost each matrix: the stream moves as the whole model says, and bytes go where they gain most."""

from __future__ import annotations

import pytest
import torch
from helpers.toys import toy_model

from arriero.checkpoint.sensitivity import costs, widened
from arriero.checkpoint.weights import from_model
from arriero.model.config import LlamaConfig
from arriero.model.layout import Rows
from arriero.model.rope import rope_tables
from arriero.quant.rounding import nearest


@torch.no_grad()
def test_a_unit_costs_what_the_stream_behind_its_layer_moves():
    model = toy_model(LlamaConfig(64, 2, 4, 2, 96, 211, 64))
    weights = from_model(model)
    kinds = {name: "int4" for name in weights.entries if name.endswith(("_proj.weight", "lm_head.weight"))}
    rows = torch.randint(211, (3, 17), generator=torch.Generator().manual_seed(1))
    found = costs(weights, kinds, rows)
    assert len(found) == 2 * 4 + 1
    assert sorted(name for unit in found for name in unit) == sorted(kinds)

    def behind_first_layer() -> torch.Tensor:
        layout = Rows.of(rows)
        rope = rope_tables(model.config, layout.positions)
        return model.model.layers[0](model.model.embed_tokens(rows), rope, layout.attention(0))

    exact = behind_first_layer()
    unit = tuple(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    for name in unit:
        parameter = model.get_parameter(name)
        parameter.copy_(nearest(parameter, "int4").dense())
    moved = (behind_first_layer() - exact).square().sum() / exact.square().sum()
    assert found[unit] == pytest.approx(float(moved), rel=1e-3)


def test_bytes_go_where_they_gain_most():
    found = {("a",): 6.0, ("b", "c"): 10.0, ("d",): 1.0, ("e",): 5.0}
    kinds = dict.fromkeys("abcde", "int4")
    size = {"a": 20, "b": 10, "c": 10, "d": 2, "e": 100}.__getitem__
    # by the byte: b and c 0.5, d 0.5 (later in order), a 0.3, e 0.05
    for room, wider in ((1, ""), (2, "d"), (20, "bc"), (22, "bcd"), (41, "bcd"), (42, "abcd"), (142, "abcde")):
        chosen = widened(found, kinds, room, size)
        assert "".join(name for name in "abcde" if chosen[name] == "int8") == wider, room
