"""The C++ step: a token's logits are the same bits whatever else runs, and those of the torch forward."""

from __future__ import annotations

import platform
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.errors import ConfigError
from arriero.infer import native_step as native
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.native_step import NativeStep
from arriero.infer.sample import sample
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.step import BLOCK, StepInput
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state, use_adapter, using_adapter
from arriero.model.lora_config import LoraConfig
from arriero.model.quantized import quantize_linears
from arriero.quant.packed import UNIFORM, from_indices

N_BLOCKS = 60  # six documents of 290 tokens
KINDS = ("fp32", "bf16", "twelve", "int8", "nf4", "int8 by 8", "nf4 by 8")  # by 8: activations of eight bits
ADAPTERS = {"one": LoraConfig(rank=3, alpha=20), "two": LoraConfig(rank=5, targets=("q_proj", "down_proj"))}
WIDE = LlamaConfig(64, 2, 4, 2, 128, 131, 1024, head_dim=64)  # whole vectors, and groups of int4


@pytest.fixture(scope="module")
def library():
    """The compiled kernels: this project's machines have a compiler, so their absence is a failure."""
    found = native.load_library()
    assert found is not None, "the C++ step did not compile here"
    return found


def with_adapters(model: Llama) -> Llama:
    for i, (name, config) in enumerate(ADAPTERS.items()):
        add_lora(model, config, seed=i, name=name)
        for tensor, p in lora_state(model, name).items():
            if "lora_B" in tensor:
                p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    use_adapter(model, None)
    return model.requires_grad_(False)


def step_of(library, model: Llama, kind: str = "", **how) -> NativeStep:
    step = NativeStep(library, model, N_BLOCKS, activation_bits=8 if kind.endswith("by 8") else 15, **how)
    for name, config in ADAPTERS.items():
        if tensors := lora_state(model, name):
            step.add_adapter(name, config, tensors)
    return step


def alone(step: NativeStep, ids: list[int], adapter: str | None = None) -> torch.Tensor:
    """Logits of all tokens, the prompt in one piece, in the first blocks."""
    n = len(ids)
    blocks = np.arange(-(-n // BLOCK))[None]
    return step(StepInput(np.array(ids), np.arange(n), np.zeros(n, int), blocks, np.arange(n), [adapter]))


def documents(vocabulary: int, lengths, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def test_a_step_is_the_torch_forward_in_fp32(library, model):
    (ids,) = documents(model.config.vocab_size, [77])
    torch.testing.assert_close(alone(step_of(library, model), ids), model(torch.tensor([ids]))[0], atol=2e-4, rtol=0)


def test_heads_of_whole_vectors_and_several_chunks_of_keys_are_the_torch_forward(library):
    model = Llama(WIDE).init_weights(std=0.2, seed=1).requires_grad_(False)
    (ids,) = documents(WIDE.vocab_size, [700])
    torch.testing.assert_close(alone(step_of(library, model), ids), model(torch.tensor([ids]))[0], atol=5e-4, rtol=0)


def test_bf16_is_nearer_to_fp32_than_torch_is(library):
    model = Llama(WIDE).init_weights(std=0.1, seed=1).requires_grad_(False).to(torch.bfloat16)
    (ids,) = documents(WIDE.vocab_size, [90])
    wide = Llama(WIDE)
    wide.load_state_dict(model.state_dict())
    exact = wide(torch.tensor([ids]))[0]
    ours, theirs = (x.float() - exact for x in (alone(step_of(library, model), ids), model(torch.tensor([ids]))[0]))
    assert ours.abs().mean() < 0.7 * theirs.abs().mean()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_integer_weights_are_the_dequantised_forward_within_the_rounding_of_activations(library, kind):
    model = quantize_linears(Llama(WIDE).init_weights(std=0.1, seed=1).requires_grad_(False), kind)
    (ids,) = documents(WIDE.vocab_size, [60])
    exact = model(torch.tensor([ids]))[0]
    error = (alone(step_of(library, model), ids) - exact).abs().mean() / exact.abs().mean()
    assert error < {"int8": 5e-4, "nf4": 0.02}[kind]  # NF4's levels are held as 127ths


def made(kind: str) -> Llama:
    """bf16 with weights of many magnitudes, which twelve bits do not pay for; "twelve" with a few rare ones."""
    model = Llama(WIDE).init_weights(std=0.1, seed=2).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and kind == "bf16":
            module.weight.mul_(2.0 ** torch.randint(-28, 1, module.weight.shape, generator=generator))
        elif isinstance(module, torch.nn.Linear) and kind == "twelve":
            module.weight[::23, ::9] *= 2.0**-40
    if kind in ("bf16", "twelve"):
        return with_adapters(model.to(torch.bfloat16))
    return with_adapters(model if kind == "fp32" else quantize_linears(model, kind.split()[0]))


def run_schedule(step: NativeStep, ids: list[list[int]], adapters, draw) -> list[torch.Tensor]:
    """Logits of all tokens, documents in scattered blocks, in random pieces, beside each other."""
    free = draw.permutation(N_BLOCKS).tolist()
    tables = np.zeros((len(ids), 1 + max(len(d) for d in ids) // BLOCK), int)
    for row, document in zip(tables, ids, strict=True):
        for b in range(-(-len(document) // BLOCK)):
            row[b] = free.pop()
    done, found = [0] * len(ids), [[] for _ in ids]
    while any(d < len(document) for d, document in zip(done, ids, strict=True)):
        tokens, positions, sequences = [], [], []
        for i in draw.permutation(len(ids)).tolist():
            count = min(int(draw.choice([0, 1, 1, 2, 5, 33, 70])), len(ids[i]) - done[i])
            tokens += ids[i][done[i] : done[i] + count]
            positions += range(done[i], done[i] + count)
            sequences += [i] * count
            done[i] += count
        if tokens:
            outputs = draw.permutation(len(tokens))
            arrays = (np.array(x) for x in (tokens, positions, sequences))
            logits = step(StepInput(*arrays, tables, outputs, adapters))
            back = torch.empty_like(logits)
            back[torch.from_numpy(outputs)] = logits
            for row, i in zip(back, sequences, strict=True):
                found[i].append(row)
    return [torch.stack(rows) for rows in found]


def kinds_of(step: NativeStep) -> set[int]:
    return {matrix.kind for matrix in (*step.matrices, step.head)}


def test_trained_weights_are_held_in_twelve_bits_and_those_of_many_magnitudes_as_they_are(steps):
    assert kinds_of(steps["twelve"]) == {native.TWELVE} and kinds_of(steps["bf16"]) == {native.BF16}
    rare = [matrix.rare_ends[-1].item() for matrix in steps["twelve"].matrices]
    assert min(rare) > 0, "the rare weights are tested too"
    assert steps["twelve"].memory["weights"] < 0.8 * steps["bf16"].memory["weights"]


def test_twelve_bits_multiply_to_the_same_bits_as_sixteen(library):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(200, 90, generator=generator).bfloat16()
    weight[3, 5], weight[150, 89], weight[199, 0] = 2.0**90, -(2.0**-90), 2.0**-100
    plain = native.pack_matrix(library, weight)
    twelve = native.in_twelve_bits(library, plain)
    assert twelve.kind == native.TWELVE
    for n in (1, 2, 5, 8, 9, 40, 70):
        x = torch.randn(n, 90, generator=generator)
        assert torch.equal(native.product(library, twelve, x), native.product(library, plain, x))


@pytest.fixture(scope="module")
def steps(library):
    return {kind: step_of(library, made(kind), kind) for kind in KINDS}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_logits_are_the_same_bits_alone_and_in_any_schedule(steps, seed, kind):
    draw, step = np.random.default_rng(seed), steps[kind]
    lengths = draw.choice([1, 2, 17, 31, 32, 33, 64, 100, 290], size=draw.integers(1, 7)).tolist()
    ids = documents(WIDE.vocab_size, lengths, seed=seed % 1000)
    adapters = [draw.choice([None, *ADAPTERS]) for _ in ids]
    mixed = run_schedule(step, ids, adapters, draw)
    for document, adapter, found in zip(ids, adapters, mixed, strict=True):
        assert torch.equal(found, alone(step, document, adapter))


@pytest.mark.parametrize("kind", KINDS)
def test_one_thread_or_three_make_the_same_bits(library, kind):
    model = made(kind)
    (ids,) = documents(WIDE.vocab_size, [300])
    one, three = (alone(step_of(library, model, kind, threads=n), ids) for n in (1, 3))
    assert torch.equal(one, three)
    last = (np.array(ids[-1:]), np.array([299]), np.zeros(1, int), np.arange(10)[None], np.zeros(1, int), [None])
    step = step_of(library, model, kind, threads=2)  # of few tokens the chunks of the keys are dealt out
    alone(step, ids)
    assert torch.equal(step(StepInput(*last))[0], one[-1])


TILES = Path(__file__).with_name("emulated_amx.h")
EMULATED_AMX = ("-mamx-tile", "-mamx-bf16", "-include", str(TILES), f"-DOF={zlib.crc32(TILES.read_bytes())}")
CPUS = {  # what it needs, flags
    "avx2": ("avx2", "-march=x86-64-v3"),
    "avx512": ("avx512bw", "-march=x86-64-v4"),
    "bf16": ("avx512_bf16", "-march=cooperlake"),
    "amx": ("avx512_bf16", "-march=cooperlake", *EMULATED_AMX),
}


@pytest.mark.parametrize("name", CPUS)
def test_kernels_for_other_cpus_are_the_torch_forward_and_as_indifferent_to_the_schedule(name):
    cpu, (needed, *flags) = Path("/proc/cpuinfo"), CPUS[name]
    if platform.machine() != "x86_64" or not cpu.is_file() or f" {needed} " not in cpu.read_text():
        pytest.skip(f"this CPU has no {needed}")
    library, draw = native.load_library(*flags), np.random.default_rng(3)
    ids = documents(WIDE.vocab_size, [1, 33, 100, 290])
    for kind in KINDS:
        model, adapters = made(kind), [None, "one", None, "two"]
        step = step_of(library, model, kind)
        for document, adapter, found in zip(ids, adapters, run_schedule(step, ids, adapters, draw), strict=True):
            assert torch.equal(found, alone(step, document, adapter))
        exact = model.float()(torch.tensor([ids[2]]))[0]
        error = (alone(step, ids[2]) - exact).abs().mean() / exact.abs().mean()
        assert error < {"fp32": 1e-5, "int8": 5e-4, "nf4": 0.02, "nf4 by 8": 0.04}.get(kind, 0.02)


def test_an_adapter_is_the_one_of_the_model(library, gqa):
    model = with_adapters(gqa)
    step = step_of(library, model)
    (ids,) = documents(101, [40])
    for name in (None, *ADAPTERS):
        with using_adapter(model, name):
            torch.testing.assert_close(alone(step, ids, name), model(torch.tensor([ids]))[0], atol=2e-4, rtol=0)


def test_an_adapter_that_acts_when_the_step_is_made_is_folded(library, gqa):
    model = with_adapters(gqa)
    use_adapter(model, "two")
    (ids,) = documents(101, [40])
    found = alone(NativeStep(library, model, N_BLOCKS), ids)
    torch.testing.assert_close(found, model(torch.tensor([ids]))[0], atol=2e-4, rtol=0)


def test_a_block_takes_the_memory_that_is_said(library, gqa):
    step = step_of(library, gqa)
    assert step.memory["cache"] == N_BLOCKS * native.block_bytes(gqa.config, torch.float32)


def test_a_copied_block_is_read_like_its_source(library, gqa):
    step = step_of(library, gqa)
    (ids,) = documents(101, [40])
    whole = alone(step, ids)
    step.copy_blocks([(0, 7), (1, 9)])
    last = (np.array(ids[-1:]), np.array([39]), np.zeros(1, int), np.array([[7, 9]]), np.zeros(1, int), [None])
    assert torch.equal(step(StepInput(*last))[0], whole[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_refitted_step_is_one_made_of_the_new_weights(library, toys, tied, dtype):
    old, new = (toys("mqa" if tied else "gqa", seed).to(dtype) for seed in (0, 1))
    step = step_of(library, old)
    for name, tensor in new.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            step.refit(name, tensor)
    (ids,) = documents(101, [40])
    assert torch.equal(alone(step, ids), alone(step_of(library, new), ids))
    with pytest.raises(ConfigError, match=r"refit: the model has no weight 'model\.x'"):
        step.refit("model.x", torch.zeros(1))
    with pytest.raises(ConfigError, match=r"refit: model\.norm\.weight has shape \[3\], and the model needs"):
        step.refit("model.norm.weight", torch.zeros(3))


def test_groups_with_scales_and_minimums_are_their_formula(library):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (70, 96), generator=generator)
    scales, minimums = (torch.rand(70, 3, generator=generator).half().float() for _ in range(2))
    bytes_ = torch.randint(-127, 128, (70, 96), generator=generator)
    for kind, indices, least in (("int4", codes, None), ("int4-affine", codes, -minimums), ("int8", bytes_, None)):
        matrix = from_indices(kind, indices, scales, least)
        x, packed = torch.randn(41, 96, generator=generator), native.pack_quantized(library, matrix)
        found = native.product(library, packed, x)
        exact = x @ matrix.dense().T
        assert (found - exact).abs().max() < 1e-4 * exact.abs().max()
        for n in (1, 3, 7, 8, 33):  # codes are looked up once for many rows, again and again for few: the same bits
            assert torch.equal(native.product(library, packed, x[:n]), found[:n]), f"{kind}, {n} rows"
        assert len(UNIFORM) == 16


@pytest.mark.parametrize("kind", ["int8", "int8 by rows", "int4", "int4-affine"])
def test_activations_of_eight_bits_are_rounded_in_groups_of_32_and_nothing_else_is(library, kind):
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (70, 96), generator=generator)
    scales, minimums = (torch.rand(70, 3, generator=generator).half().float() for _ in range(2))
    if kind.startswith("int8"):
        codes, scales = codes - 8, scales[:, :1] if kind.endswith("rows") else scales
    matrix = from_indices(kind.split()[0], codes, scales, -minimums if kind == "int4-affine" else None)
    x = torch.randn(41, 96, generator=generator)
    unit = x.view(41, 3, 32).abs().amax(2, keepdim=True) / 127
    rounded = ((x.view(41, 3, 32) / unit).round() * unit).view(41, 96)
    packed = native.pack_quantized(library, matrix)
    packed.digits = native.DIGITS[8]
    found, exact = native.product(library, packed, x), rounded.double() @ matrix.dense().double().T
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
    for n in (1, 3, 6, 7, 8, 12, 33):
        assert torch.equal(native.product(library, packed, x[:n]), found[:n]), f"{n} rows"


def test_eight_bits_lose_more_than_fifteen_and_other_numbers_are_refused(library):
    model = quantize_linears(Llama(WIDE).init_weights(std=0.1, seed=1).requires_grad_(False), "int8")
    (ids,) = documents(WIDE.vocab_size, [60])
    exact = model(torch.tensor([ids]))[0]
    fifteen, eight = ((alone(step_of(library, model, kind), ids) - exact).abs().mean() for kind in ("", "by 8"))
    assert 5 * fifteen < eight < 0.02 * exact.abs().mean()
    with pytest.raises(ConfigError, match="activation_bits is 4; it must be 8 or 15"):
        Engine(model, activation_bits=4)


def test_a_model_that_has_no_use_for_eight_bits_says_so_once(gqa, fresh_warnings):
    for _ in range(2):
        Engine(gqa, cache_tokens=64, activation_bits=8)
    (said,) = fresh_warnings()
    assert said.startswith("activation_bits is 8, which changes nothing of this model: its matrices are not quantised")


def test_a_steps_threads_sample_what_other_threads_do(library, gqa):
    share = step_of(library, gqa, threads=3).share
    logits = 3 * torch.randn(11, 101, generator=torch.Generator().manual_seed(4))
    rows = [SamplerRow(SamplingConfig(temperature=0.8, top_p=0.9, seed=i), logprobs=True) for i in range(11)]
    for m in (1, 2, 11):
        mine, others = sample(logits[:m], rows[:m], share), sample(logits[:m], rows[:m])
        assert np.array_equal(mine.ids, others.ids) and np.array_equal(mine.sampled, others.sampled)
