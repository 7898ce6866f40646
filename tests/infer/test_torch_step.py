"""The step over a paged cache against the model's forward on whole sequences, for any way of cutting them up."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.engines import QWEN, SHAPE, adapted, adapter, engine_toy, pieces, run_pieces, step_input

from arriero.errors import ConfigError
from arriero.infer.torch_step import TorchStep
from arriero.model.linear import Linear, named_products
from arriero.model.lora import using_adapter
from arriero.model.lora_config import LoraConfig
from arriero.model.quantized import QuantizedLinear, quantize_linears

LENGTHS = (1, 31, 32, 33, 97, 5, 64)


def prompts(rng):
    return [[rng.randrange(101) for _ in range(n)] for n in LENGTHS]


@pytest.mark.parametrize("shape", [SHAPE, QWEN], ids=["llama", "qwen3"])
@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_pieces_gives_the_logits_of_whole_sequences(shape, seed):
    model, rng = engine_toy(shape), random.Random(seed)
    ids = prompts(rng)
    step = TorchStep(model, 40)
    logits = run_pieces(step, ids, pieces(rng, LENGTHS, 70), [None] * len(ids), rng)
    for one, found in zip(ids, logits, strict=True):
        expected = model(torch.tensor([one]))[0].float()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_each_sequence_has_its_own_adapter_or_none():
    model, rng = engine_toy(), random.Random(7)
    loads = {"a": adapter(1), "b": adapter(2, LoraConfig(rank=2, alpha=5.0))}
    step = TorchStep(model, 40)
    for name, (config, tensors) in loads.items():
        step.add_adapter(name, config, tensors)
    ids = prompts(rng)
    names = [None, "a", "b", "a", "b", None, "a"]
    models = {None: model} | {name: adapted(model, given) for name, given in loads.items()}
    for acting in (names, ["a"] * len(ids), [None] * len(ids)):
        logits = run_pieces(step, ids, pieces(rng, LENGTHS, 50), acting, rng)
        for one, name, found in zip(ids, acting, logits, strict=True):
            torch.testing.assert_close(found, models[name](torch.tensor([one]))[0].float(), atol=1e-6, rtol=0)
    step.remove_adapter("a")
    found = run_pieces(step, ids[:2], pieces(rng, LENGTHS[:2], 50), ["b", None], rng)
    torch.testing.assert_close(found[0], models["b"](torch.tensor([ids[0]]))[0].float(), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="no adapter 'a'"):
        run_pieces(step, ids[:1], pieces(rng, LENGTHS[:1], 50), ["a"], rng)


def test_adapters_leave_the_model_that_a_trainer_holds_as_it_is():
    model = engine_toy().requires_grad_(True).train()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    step = TorchStep(model, 4)
    step.add_adapter("a", *adapter(1))
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_an_adapter_that_acts_is_folded_and_what_is_quantised_stays_so():
    model, rng = quantize_linears(adapted(engine_toy(dtype=torch.float32), adapter(1)), "int8"), random.Random(5)
    step = TorchStep(model, 9)
    kinds = {type(module) for _, module in named_products(step._model)}
    assert kinds == {Linear, QuantizedLinear}
    ids = prompts(rng)[4:5]
    expected = model(torch.tensor(ids))[0]
    found = run_pieces(step, ids, pieces(rng, LENGTHS[4:5], 70), [None], rng)[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (found - using_none(model, ids)).abs().max() > 0.1


def using_none(model, ids):
    with using_adapter(model, None):
        return model(torch.tensor(ids))[0]


def test_a_copied_block_holds_what_its_source_did():
    model, rng = engine_toy(), random.Random(3)
    ids = prompts(rng)[4]
    step = TorchStep(model, 9)
    expected = run_pieces(step, [ids], [[(0, 0, 97)]], [None], random.Random(1))[0]
    step(step_input([ids], [[0, 1, 2, 3]], [(0, 0, 97)], [None]))
    step.copy_blocks([(0, 8), (1, 7), (2, 6), (7, 5)])
    found = step(step_input([ids], [[8, 5, 6, 4]], [(0, 96, 97)], [None]))
    torch.testing.assert_close(found[0], expected[-1], atol=1e-6, rtol=0)


def test_new_weights_are_taken_one_by_one_and_checked():
    model, other, rng = engine_toy(), engine_toy(seed=9), random.Random(3)
    step = TorchStep(model, 9)
    step.add_adapter("a", *adapter(1))
    for name, tensor in other.state_dict().items():
        step.refit(name, tensor)
    ids = prompts(rng)[3:4]
    found = run_pieces(step, ids, [[(0, 0, 33)]], [None], rng)[0]
    torch.testing.assert_close(found, other(torch.tensor(ids))[0].float(), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match=r"no weight 'model\.norm'; names are those"):
        step.refit("model.norm", torch.ones(24))
    with pytest.raises(ConfigError, match=r"norm\.weight has shape \[23\], and the model needs \[24\]"):
        step.refit("model.norm.weight", torch.ones(23))
