"""The C++ step against its slow twin, Llama.forward with a KVCache."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.infer import kernels
from arriero.infer.config import SamplingConfig
from arriero.infer.dense import Session, prefill, torch_step
from arriero.infer.kernels import CompressedWeights, NativeStep, native_step
from arriero.infer.sample import Sampler
from arriero.model.cache import KVCache
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.lora import add_lora
from arriero.model.lora_config import LoraConfig
from arriero.system.cpp import load_cpp

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


SPECIAL = [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0xFF80, 0x7F80, 0x7FC0, 0xFFFF, 0x7F81]
"""bf16 bits: zeros, subnormals, the smallest and the largest normal, infinities, NaNs quiet and signalling."""


def bits(matrix):
    return matrix.view(torch.int16)


def odd_ones_among(weights, odd):
    """The weights with these bit patterns strewn among them, seven to a row at most."""
    strewn = weights.clone()
    for i, pattern in enumerate(odd):
        bits(strewn)[i // 7, (i * 37) % weights.shape[1]] = pattern - (pattern >> 15 << 16)
    return strewn


@given(st.lists(st.integers(0, 0xFFFF), max_size=50), st.integers(-120, 120), st.booleans())
@settings(deadline=None, max_examples=50)
def test_packed_weights_are_the_same_bits(native, odd, magnitude, scattered):
    """Whatever they are; where most of a matrix has exponents of its own, it stays as it is."""
    weights = torch.randn(29, 448, generator=torch.Generator().manual_seed(len(odd))) * 2.0**magnitude
    if scattered:
        weights *= torch.logspace(-30, 30, 448, base=2.0)
    weights = odd_ones_among(weights.bfloat16(), SPECIAL + odd)
    before = weights.clone()
    packed = CompressedWeights(native, [weights, weights[:, :29].contiguous()])
    assert torch.equal(bits(packed.unpack(0)), bits(before))
    assert torch.equal(bits(packed.unpack(1)), bits(before[:, :29]))
    bits(weights).fill_(0)
    assert torch.equal(bits(packed.unpack(0)), bits(weights if scattered else before))  # a copy, or the matrix itself


@pytest.mark.slow  # two compilations
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86's other vector units")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_other_vector_units_unpack_the_same_bits(native, monkeypatch, cpu):
    monkeypatch.setattr(
        kernels, "load_cpp", lambda *_: load_cpp(Path(kernels.__file__).with_suffix(".cpp"), "", f"-march={cpu}", "-O1")
    )
    other = kernels.load_library.__wrapped__()
    weights = odd_ones_among(torch.randn(29, 448).bfloat16(), SPECIAL)
    assert torch.equal(bits(CompressedWeights(other, [weights]).unpack(0)), bits(weights))


@pytest.fixture
def packable():
    """A bf16 toy whose widths are all multiples of 64, with odd weights in it, and the same values in fp32."""
    config = LlamaConfig(128, 2, 3, 1, 192, 109, 211, head_dim=64)
    half = Llama(config).init_weights(std=0.1, seed=3).requires_grad_(False).to(torch.bfloat16)
    for parameter in half.parameters():
        if parameter.dim() == 2:
            parameter.view(-1)[5::1009] = 3e-20
    wide = Llama(config).requires_grad_(False)
    wide.load_state_dict(half.state_dict())
    return half, wide


def packs(step):
    return step._packed is not None


@pytest.mark.parametrize("lengths", [[11], [2, 7], [2, 7, 5]])
def test_a_step_with_packed_weights_is_the_torch_forward(native, packable, lengths, monkeypatch):
    monkeypatch.setattr(kernels, "PACK_AFTER", 3)
    twins_agree(*packable, lengths, steps=7, atol=1e-4)


def test_weights_are_packed_for_long_generations_of_few_sequences(native, packable, monkeypatch):
    monkeypatch.setattr(kernels, "PACK_AFTER", 3)
    cache, _ = prefilled(packable[0], [2, 7, 5, 3])
    step = native_step(packable[0], cache)
    for rows in ([0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3], [1], [0, 1, 2, 3]):
        assert not packs(step)
        step(torch.tensor(rows), torch.tensor(rows))
    step(torch.tensor([5]), torch.tensor([2]))
    assert packs(step)
    cache, _ = prefilled(packable[1], [2])
    for _ in range(3):
        (wide := native_step(packable[1], cache))(torch.tensor([5]), torch.tensor([0]))
    assert not packs(wide)  # fp32


def test_what_one_generation_packed_serves_the_next(native, packable, monkeypatch):
    monkeypatch.setattr(kernels, "PACK_AFTER", 2)
    model = packable[0]

    def step():
        return native_step(model, prefilled(model, [3])[0])

    first = step()
    for _ in range(2):
        first(torch.tensor([5]), torch.tensor([0]))
    assert packs(second := step()) and second._packed[0] is first._packed[0]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)  # other memory
    assert not packs(step()) and not packs(step())
    with torch.inference_mode():
        loaded = model.__class__(model.config).to(torch.bfloat16)
        loaded.load_state_dict(model.state_dict())
    for _ in range(2):  # whose changes nothing counts: packed for one generation only
        step = native_step(loaded, prefilled(loaded, [3])[0])
        assert not packs(step)
        for _ in range(2):
            step(torch.tensor([5]), torch.tensor([0]))
        assert packs(step)


def test_a_model_too_large_for_this_machine_is_not_packed(native, packable, monkeypatch):
    monkeypatch.setattr(kernels, "PACK_AFTER", 1)
    monkeypatch.setattr(kernels, "SHARE_OF_MEMORY", 1e-9)
    cache, _ = prefilled(packable[0], [2])
    step = native_step(packable[0], cache)
    step(torch.tensor([5]), torch.tensor([0]))
    assert not packs(step)


def test_a_training_step_is_heard_at_once(native, packable, monkeypatch):
    """In the next generation, and in a session that was there before."""
    monkeypatch.setattr(kernels, "PACK_AFTER", 2)
    model, prompt, greedy = packable[0], [7, 11, 13], Sampler(SamplingConfig(temperature=0.0))

    def answer(session):
        return list(session.tokens(prompt, greedy, 17, ()))

    old = Session(model)
    before = answer(old)
    assert packs(old._step)
    matrices = [p.requires_grad_() for p in model.parameters() if p.dim() == 2]  # a session copies the norms' weights
    optimizer = torch.optim.AdamW(matrices, lr=0.1)
    model(torch.tensor([prompt])).float().logsumexp(-1).mean().backward()
    optimizer.step()
    model.requires_grad_(False)
    monkeypatch.setattr(kernels, "PACK_AFTER", -1)
    untouched = answer(Session(model))
    assert untouched != before
    monkeypatch.setattr(kernels, "PACK_AFTER", 2)
    assert answer(Session(model)) == untouched
    old.ids = []  # the cache holds what the old weights made of the prompt
    assert answer(old) == untouched
    assert not packs(old._step)


def test_a_step_outlives_the_tensors_of_its_model(native, gqa):
    ours, _ = prefilled(gqa, [5])
    step, (tokens, rows) = native_step(gqa, ours), (torch.tensor([3]), torch.arange(1))
    before = step(tokens, rows)
    gqa.to(torch.float64)
    ours.lengths = ours.lengths - 1
    assert torch.equal(step(tokens, rows), before)


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
