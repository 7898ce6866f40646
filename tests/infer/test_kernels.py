"""The C++ step against its slow twin, Llama.forward with a KVCache."""

from __future__ import annotations

import logging

import pytest
import torch

from arriero.infer import kernels
from arriero.infer.generate import prefill, torch_step
from arriero.infer.kernels import NativeStep, native_step
from arriero.model.cache import KVCache
from arriero.model.config import LoraConfig
from arriero.model.lora import add_lora

CAPACITY = 43


def prefilled(model, lengths, dtype=torch.float32):
    """Two caches with the same ragged prompts."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    caches = [KVCache(model.config, len(lengths), CAPACITY, dtype) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            prefill(model, cache, prompts)
    return caches


def twins_agree(model, twin, lengths, steps, atol, cache_dtype=torch.float32):
    ours, theirs = prefilled(twin, lengths, cache_dtype)
    fast, slow = native_step(model, ours), torch_step(twin, theirs)
    assert isinstance(fast, NativeStep)
    generator, rows = torch.Generator().manual_seed(2), torch.arange(len(lengths))
    for _ in range(steps):
        tokens = torch.randint(0, model.config.vocab_size, (len(lengths),), generator=generator)
        torch.testing.assert_close(fast(tokens, rows), slow(tokens, rows), atol=atol, rtol=0)
    assert torch.equal(ours.lengths, theirs.lengths)
    torch.testing.assert_close(ours.k, theirs.k, atol=atol, rtol=0)
    torch.testing.assert_close(ours.v, theirs.v, atol=atol, rtol=0)


@pytest.mark.parametrize("lengths", [[11], [2, 7, 5], [3, 1, 17, 4, 9, 2, 5, 13, 1, 6, 8]])
def test_the_native_step_is_the_torch_forward_in_fp32(native, model, lengths):
    twins_agree(model, model, lengths, steps=5, atol=1e-4)


@pytest.mark.parametrize("lengths", [[11], [3, 1, 17, 4, 9]])
def test_bf16_weights_give_the_fp32_forward_of_the_same_values(native, model, lengths):
    half = model.to(torch.bfloat16)
    wide = type(model)(model.config).requires_grad_(False)
    wide.load_state_dict(half.state_dict())
    twins_agree(half, wide, lengths, steps=5, atol=1e-4)


def test_a_bf16_model_differs_from_torch_bf16_by_its_rounding_only(native, model):
    """Relative to the largest logit: bf16 has 8 bits, and torch rounds after each of some ten operations a layer."""
    half = model.to(torch.bfloat16)
    ours, theirs = prefilled(half, [11, 4], torch.bfloat16)
    tokens, rows = torch.tensor([3, 5]), torch.arange(2)
    fast, slow = native_step(half, ours)(tokens, rows), torch_step(half, theirs)(tokens, rows)
    assert (fast - slow).abs().max() < 0.05 * slow.abs().max()


def test_threads_do_not_change_the_logits(native, gqa):
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        cache, _ = prefilled(gqa, [5, 7])
        results.append(native_step(gqa, cache)(torch.tensor([1, 2]), torch.arange(2)))
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_step_reads_the_live_weights(native, gqa):
    ours, theirs = prefilled(gqa, [5])
    fast, slow = native_step(gqa, ours), torch_step(gqa, theirs)
    gqa.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    gqa.model.layers[0].input_layernorm.weight.mul_(0.5)
    tokens, rows = torch.tensor([3]), torch.arange(1)
    torch.testing.assert_close(fast(tokens, rows), slow(tokens, rows), atol=1e-4, rtol=0)


def test_rows_that_do_not_step_are_left_alone(native, gqa):
    for step_of in (native_step, torch_step):
        cache, untouched = prefilled(gqa, [5, 7, 3])
        step_of(gqa, cache)(torch.tensor([1, 2]), torch.tensor([2, 0]))
        assert cache.lengths.tolist() == [6, 7, 4]
        assert torch.equal(cache.k[:, 1, :, :7], untouched.k[:, 1, :, :7])


def test_extreme_scores_stay_finite(native, gqa):
    for layer in gqa.model.layers:
        layer.self_attn.q_proj.weight.mul_(1000)
        layer.mlp.gate_proj.weight.mul_(1000)
    cache, _ = prefilled(gqa, [11])
    assert native_step(gqa, cache)(torch.tensor([3]), torch.tensor([0])).isfinite().all()


def test_a_full_cache_is_refused(native, gqa):
    for step_of in (native_step, torch_step):
        cache, _ = prefilled(gqa, [CAPACITY])
        with pytest.raises(ValueError, match=f"capacity of {CAPACITY}"):
            step_of(gqa, cache)(torch.tensor([1]), torch.tensor([0]))


def test_what_the_kernels_cannot_read_goes_through_torch(native, gqa):
    cache = KVCache(gqa.config, 1, CAPACITY)
    gqa.model.layers[0].mlp.up_proj.weight.data = gqa.model.layers[0].mlp.up_proj.weight.data.bfloat16()
    assert native_step(gqa, cache) is None  # linears of two types
    assert native_step(gqa.half(), cache) is None
    adapted = add_lora(gqa.float(), LoraConfig(rank=2))
    assert native_step(adapted, cache) is None


def test_no_compiler_is_one_line_of_notice(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert kernels.load_library.__wrapped__() is None
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["no C++ compiler found"]


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_is_one_line_of_notice(monkeypatch, caplog, tmp_path, compiler):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert kernels.load_library.__wrapped__() is None
    assert len(caplog.records) == 1
    assert "decoding through torch" in caplog.text
    assert not list(tmp_path.rglob("*.so"))
