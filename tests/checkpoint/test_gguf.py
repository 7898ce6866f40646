"""GGUF in and out, with the gguf package's own reader as the oracle."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from helpers.toys import equal_weights, toy_config, toy_model

from arriero.checkpoint.gguf import Kind, open_gguf, read_config, write_gguf
from arriero.checkpoint.gguf_rope import rope_factors
from arriero.checkpoint.load import load_model
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError
from arriero.io.gguf_header import read_metadata
from arriero.model.config import LlamaConfig
from arriero.model.scaling import Llama3Scaling

TYPES = {torch.float32: Kind.F32, torch.bfloat16: Kind.BF16, torch.float16: Kind.F16}


@pytest.mark.parametrize("dtype", TYPES)
def test_round_trip_is_bit_exact(family, dtype, tmp_path):
    model = toy_model(family, dtype)
    write_gguf(from_model(model), tmp_path / "m.gguf", kind=TYPES[dtype], tokenizer={})
    back = load_model(tmp_path / "m.gguf")
    assert back.config == model.config
    assert equal_weights(model, back)


def test_every_entry_of_a_real_file_equals_that_of_the_gguf_package(smollm2_gguf):
    expected = {
        name: field.contents()
        for name, field in gguf.GGUFReader(smollm2_gguf).fields.items()
        if not name.startswith("GGUF.")
    }
    assert read_metadata(smollm2_gguf) == expected
    assert len(expected["tokenizer.ggml.merges"]) == 48_900


def test_the_gguf_package_reads_what_we_write(tmp_path):
    config = toy_config("llama3.1-8b")
    model = toy_model(config, torch.bfloat16)
    entries = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["ä", "b"], "tokenizer.ggml.scores": [0.5, 2.0],
               "tokenizer.ggml.token_type": [1, 3], "tokenizer.ggml.add_bos_token": False}  # fmt: skip
    write_gguf(from_model(model), tmp_path / "m.gguf", kind=Kind.BF16, tokenizer=entries, name="toy")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    got = {name: field.contents() for name, field in reader.fields.items()}
    assert got["general.name"] == "toy"
    assert {name: got[name] for name in entries} == entries
    assert got["llama.attention.head_count_kv"] == 2
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 3 + 9 * 3 + 1
    assert {t.tensor_type for name, t in tensors.items() if "norm" in name or "rope" in name} == {Kind.F32}
    assert {t.tensor_type for name, t in tensors.items() if "norm" not in name and "rope" not in name} == {Kind.BF16}
    up = gguf.quants.dequantize(tensors["blk.1.ffn_up.weight"].data, Kind.BF16)
    assert np.array_equal(up, model.model.layers[1].mlp.up_proj.weight.detach().float().numpy())
    # llama.cpp rotates adjacent pairs: row 2j of a head is row j of ours, row 2j+1 is row j + h/2
    query = gguf.quants.dequantize(tensors["blk.2.attn_q.weight"].data, Kind.BF16).reshape(8, 32, 256)
    ours = model.model.layers[2].self_attn.q_proj.weight.detach().float().numpy().reshape(8, 32, 256)
    assert np.array_equal(query[:, 0::2], ours[:, :16])
    assert np.array_equal(query[:, 1::2], ours[:, 16:])


def random_blocks(kind: Kind) -> np.ndarray:
    """Bytes of a 256 x 256 matrix of a quantised type. Any bytes are a block; without that bit scales are finite."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    return rng.integers(0, 256, size=256 * 256 // per_block * block_bytes, dtype=np.uint8) & ~np.uint8(0x40)


@pytest.mark.parametrize("kind", [k for k in gguf.quants._type_traits if k is not Kind.BF16], ids=lambda k: k.name)
def test_every_type_that_the_gguf_package_dequantises_is_read(kind, tmp_path):
    """One matrix of a small model is of the type under test; the bytes are random."""
    config = LlamaConfig(256, 1, 4, 2, 256, 11, 64)
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 256,
        "feed_forward_length": 256,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    raw = random_blocks(kind)
    for name, rows in {
        "attn_q": 256,
        "attn_k": 128,
        "attn_v": 128,
        "attn_output": 256,
        "ffn_gate": 256,
        "ffn_down": 256,
    }.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.full((rows, 256), 0.5, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", raw.reshape(256, -1), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", np.ones((11, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_config(file) == config
    with np.errstate(all="ignore"):
        tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
        expected = gguf.quants.dequantize(tensor.data, kind)
        got = open_gguf(file).read("model.layers.0.mlp.up_proj.weight")
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), expected)
    assert np.unique(expected).size > 2


def test_q8_0_is_within_half_a_step_of_each_block(tmp_path):
    config = LlamaConfig(96, 2, 3, 1, 160, 211, 64)
    model = toy_model(config)
    write_gguf(from_model(model), tmp_path / "m.gguf", kind=Kind.Q8_0, tokenizer={})
    back = load_model(tmp_path / "m.gguf").state_dict()
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(weight, back[name])
        else:
            blocks = weight.view(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            error = (back[name].view(-1, 32) - blocks).abs()
            assert bool((error <= step * 0.57).all()), name  # 127 steps times the half-precision step's own 2^-11: 0.06
            assert bool((error > 0).any())


def test_rope_scaling_is_recovered_from_the_factors(tmp_path):
    for scaling in (Llama3Scaling(8.0), Llama3Scaling(32.0), Llama3Scaling(4.0, original_context=2048)):
        config = replace(toy_config("llama3.1-8b"), rope_scaling=scaling)
        write_gguf(from_model(toy_model(config)), tmp_path / "m.gguf", kind=Kind.F32, tokenizer={})
        assert read_config(tmp_path / "m.gguf").rope_scaling == scaling


def test_rope_factors_by_hand():
    """Head width 4, theta 100, wavelengths 2 pi and 20 pi; context 100: turns 15.9 and 1.59."""
    config = LlamaConfig(4, 1, 1, 1, 4, 4, 4, rope_theta=100.0, rope_scaling=Llama3Scaling(8.0, original_context=100))
    smooth = (100 / (20 * np.pi) - 1) / 3
    assert rope_factors(config).tolist() == pytest.approx([1.0, 1 / (smooth + (1 - smooth) / 8)])


def test_rope_factors_of_another_rule_are_refused(tmp_path):
    config = replace(toy_config("llama3.1-8b"), rope_scaling=Llama3Scaling(8.0, low_freq_factor=1.5))
    write_gguf(from_model(toy_model(config)), tmp_path / "m.gguf", kind=Kind.F32, tokenizer={})
    with pytest.raises(CheckpointError, match=r"rope_freqs are not those of Llama 3\.1's scaling"):
        open_gguf(tmp_path / "m.gguf")


def small_file(tmp_path, **changes):
    file = tmp_path / "m.gguf"
    write_gguf(from_model(toy_model("smollm2-135m")), file, kind=Kind.F32, tokenizer=changes)
    return file


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"general.architecture": "qwen2"}, 'architecture is "qwen2"'),
        ({"llama.expert_count": 8}, "a mixture of 8 experts"),
        ({"llama.rope.scaling.type": "longrope"}, 'RoPE scaling "longrope"; computed here are'),
        ({"llama.feed_forward_length": [107, 109, 113]}, r"'llama\.feed_forward_length' differs between layers"),
        ({"llama.rope.dimension_count": 4}, "RoPE turns 4 of 8 dimensions"),
        ({"llama.block_count": 4}, "the config says 4 layers, and the tensors are of 3"),
        ({"llama.block_count": 2}, "the config says 2 layers, and the tensors are of 3"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_what_is_no_plain_llama_is_refused(tmp_path, changes, problem):
    with pytest.raises(CheckpointError, match=problem) as error:
        open_gguf(small_file(tmp_path, **changes))
    assert "m.gguf" in str(error.value)


def test_another_vocabulary_size_than_the_embeddings_rows_is_said(tmp_path, fresh_warnings):
    rows = toy_config("smollm2-135m").vocab_size
    assert open_gguf(small_file(tmp_path, **{"llama.vocab_size": 999_999})).config.vocab_size == rows
    assert "m.gguf: llama.vocab_size is 999999, its embeddings have" in fresh_warnings()[0]


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    file = small_file(tmp_path, **{"tokenizer.ggml.tokens": ["a", "bc", "def"]})
    whole = file.read_bytes()
    for keep in [0, 3, 23, 24, *range(30, 4000, 97), len(whole) // 2, len(whole) - 40]:
        file.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            open_gguf(file)
    file.write_bytes(whole)
    open_gguf(file)


def test_other_files_and_versions_are_refused(tmp_path):
    file = small_file(tmp_path)
    whole = file.read_bytes()
    for content, problem in (
        (b"PK\3\4" + whole[4:], "not a GGUF file"),
        (whole[:4] + b"\1\0\0\0" + whole[8:], "GGUF version 1;"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "damaged or cut short"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=problem):
            open_gguf(file)
    with pytest.raises(CheckpointError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")


def test_weights_that_do_not_fit_the_type_are_refused_and_nothing_is_left(tmp_path):
    model = toy_model("smollm2-135m")
    with pytest.raises(CheckpointError, match=r"Q8_0 needs multiples of 32"):
        write_gguf(from_model(model), tmp_path / "m.gguf", kind=Kind.Q8_0, tokenizer={})
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = 70_000.0
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight holds weights beyond F16's"):
        write_gguf(from_model(model), tmp_path / "m.gguf", kind=Kind.F16, tokenizer={})
    assert list(tmp_path.iterdir()) == []
