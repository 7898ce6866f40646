"""A quantised linear multiplies by what it holds: as a plain linear of the rounded weight, forward and backward."""

from __future__ import annotations

import pytest
import torch

from arriero.distributed.parallelize import prepare
from arriero.model.build import empty_model
from arriero.model.config import LlamaConfig
from arriero.model.linear import Linear, densify, named_products
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state, merged_copy
from arriero.model.lora_config import LoraConfig
from arriero.model.quantized import QuantizedLinear, quantize_linears
from arriero.quant.formats import FORMATS

SHAPE = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=101, max_context=64)
TOKENS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))


def model() -> Llama:
    return Llama(SHAPE).init_weights(std=0.1, seed=1)


def rounded(kind: str) -> Llama:
    """A plain model whose blocks hold what the format would."""
    plain = model()
    with torch.no_grad():
        for _, linear in named_products(plain):
            linear.weight.copy_(FORMATS[kind].rounded(linear.weight))
    return plain


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_model_is_the_model_of_the_rounded_weights(kind):
    held = quantize_linears(model(), kind)
    assert {type(module) for _, module in named_products(held)} == {QuantizedLinear}
    torch.testing.assert_close(held(TOKENS), rounded(kind)(TOKENS), rtol=0, atol=0)
    torch.testing.assert_close(densify(held)(TOKENS), rounded(kind)(TOKENS), rtol=0, atol=0)
    assert {type(module) for _, module in named_products(held)} == {Linear}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # said by torch's compiler
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapter_over_it_gets_the_gradients_of_one_over_the_rounded_weights(kind, compile):
    gradients, logits = [], []
    for base in (quantize_linears(model(), kind), rounded(kind)):
        adapted = add_lora(base, LoraConfig(rank=3), seed=2)
        with torch.no_grad():
            for name, p in lora_state(adapted).items():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        prepare(adapted, compile=compile and base is not None)
        logits.append(adapted(TOKENS))
        logits[-1].square().mean().backward()
        gradients.append({name: p.grad for name, p in lora_state(adapted).items()})
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_the_backward_pass_keeps_codes_and_no_dense_weight():
    held = quantize_linears(model(), "nf4")
    kept: list[int] = []
    x = torch.randn(1, 5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        held.model.layers[0].mlp.gate_proj(x)
    assert sorted(kept) == sorted([64 * 96 // 2, 64 * 96 // 64])


def test_merging_adds_to_what_was_held():
    held = add_lora(quantize_linears(model(), "nf4"), LoraConfig(rank=3), seed=2)
    plain = add_lora(rounded("nf4"), LoraConfig(rank=3), seed=2)
    for one in (held, plain):
        with torch.no_grad():
            for p in lora_state(one).values():
                p.copy_(torch.arange(p.numel()).view(p.shape) % 7 * 0.01)
    for (name, ours), (_, theirs) in zip(
        named_products(merged_copy(held)), named_products(merged_copy(plain)), strict=True
    ):
        assert torch.equal(ours.weight, theirs.weight), name
    assert any(isinstance(module, QuantizedLinear) for module in held.modules()), "the copy leaves the model as it was"


def test_on_the_meta_device_it_waits_for_its_values():
    empty = quantize_linears(empty_model(SHAPE), "nf4")
    held = [module for module in empty.modules() if isinstance(module, QuantizedLinear)]
    assert len(held) == 14
    assert all(module.codes.is_meta and module.scales.is_meta for module in held)
