"""Linears in codes and scales: the rounded weights, wherever they are multiplied by."""

from __future__ import annotations

import pytest
import torch

from arriero.infer.native_step import NativeStep, fits, load_library
from arriero.model.config import LlamaConfig
from arriero.model.linear import Linear, densify
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state, merged_copy
from arriero.model.lora_config import LoraConfig
from arriero.model.packed import PackedLinear, pack_linears
from arriero.quant.rounding import nearest

SHAPE = LlamaConfig(64, 2, 4, 2, 128, 131, 256, head_dim=32, tied_embeddings=True)
TOKENS = torch.randint(0, 131, (1, 40), generator=torch.Generator().manual_seed(1))


def model() -> Llama:
    return Llama(SHAPE).init_weights(std=0.1, seed=1).requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_packed_linears_and_head_multiply_by_the_rounded_weights(kind):
    packed = pack_linears(model(), lambda name, weight: nearest(weight, kind))
    rounded = model()
    for module in [*rounded.modules()]:
        if type(module) is Linear and module is not rounded.head:
            module.weight = torch.nn.Parameter(nearest(module.weight, kind).dense(), requires_grad=False)
    head = nearest(rounded.head.weight, kind).dense()
    expected = rounded.model(TOKENS) @ head.T
    torch.testing.assert_close(packed(TOKENS), expected)
    assert isinstance(packed.head, PackedLinear) and not packed.tied
    assert torch.equal(densify(packed)(TOKENS), packed(TOKENS)) and type(packed.head) is Linear


def test_what_is_not_to_be_packed_stays_as_it_is():
    mixed = pack_linears(model(), lambda name, weight: nearest(weight, "int8") if "down_proj" in name else None)
    packed = [name for name, module in mixed.named_modules() if isinstance(module, PackedLinear)]
    assert packed == [f"model.layers.{i}.mlp.down_proj" for i in range(2)] and mixed.tied


def test_the_cpp_step_multiplies_by_the_same_integers():
    for kind in ("int8", "int4", "nf4"):
        packed = pack_linears(model(), lambda name, weight, kind=kind: nearest(weight, kind))
        assert fits(packed, 64)
        step = NativeStep(load_library(), packed, 4)
        assert step.memory["weights"] < sum(p.nbytes for p in model().parameters()) * (0.6 if kind == "int8" else 0.5)


def test_an_adapter_over_packed_linears_is_folded_into_what_they_hold():
    packed = add_lora(pack_linears(model(), lambda name, weight: nearest(weight, "int8")), LoraConfig(rank=2))
    for name, p in lora_state(packed).items():
        if "lora_B" in name:
            p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    merged = merged_copy(packed)
    torch.testing.assert_close(merged(TOKENS), packed(TOKENS), atol=1e-4, rtol=1e-4)
    assert type(merged.model.layers[0].mlp.up_proj) is Linear and isinstance(merged.head, PackedLinear)
