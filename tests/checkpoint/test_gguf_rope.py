"""RoPE's scaling in GGUF files: read, written, and what llama.cpp would turn by, after its sources."""

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from helpers.toys import equal_weights, toy_model

from arriero.checkpoint.convert import convert
from arriero.checkpoint.gguf import Kind, read_config, write_gguf
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.rope import rope_attention, rope_frequencies, rope_tables
from arriero.model.scaling import DynamicScaling, LinearScaling, YarnScaling

SHAPE = LlamaConfig(52, 2, 2, 1, 71, 101, 256, rope_theta=5000.0, head_dim=26)


def llama_cpp_tables(file, position: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of one position for each pair, from the file's metadata: llama_model_loader, llama_context and
    ggml_rope_yarn, line by line."""
    reader = gguf.GGUFReader(file)
    get = {key.split(".", 1)[1]: field.contents() for key, field in reader.fields.items() if "." in key}.get
    scale = get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    freq_scale = 1.0 if scale == 0 else 1.0 / scale
    kind = get("rope.scaling.type", "linear")
    if kind == "none":
        freq_scale = 1.0
    ext_factor, attn_factor = float(kind == "yarn"), get("rope.scaling.attn_factor", 1.0)
    n_dims, base = get("rope.dimension_count"), get("rope.freq_base")
    n_ctx_orig = get("rope.scaling.original_context_length", get("context_length"))

    def corr_dim(n_rot):
        return n_dims * math.log(n_ctx_orig / (n_rot * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(corr_dim(32.0))), min(n_dims - 1, math.ceil(corr_dim(1.0)))
    cos, sin = [], []
    for i0 in range(0, n_dims, 2):
        extrap = position * base ** (-i0 / n_dims)
        interp = freq_scale * extrap
        theta, mscale = interp, attn_factor
        if ext_factor != 0:
            y = (i0 // 2 - low) / max(0.001, high - low)
            ramp_mix = (1 - min(1, max(0, y))) * ext_factor
            theta = interp * (1 - ramp_mix) + extrap * ramp_mix
            mscale *= 1.0 + 0.1 * math.log(1.0 / freq_scale)
        cos.append(math.cos(theta) * mscale)
        sin.append(math.sin(theta) * mscale)
    return np.array(cos), np.array(sin)


@pytest.mark.parametrize("shape", [SHAPE, Qwen3Config(**vars(SHAPE))], ids=["llama", "qwen3"])
@pytest.mark.parametrize(
    "scaling",
    [None, LinearScaling(4), LinearScaling(0.5), YarnScaling(4.0, 64), YarnScaling(32.0, 8), YarnScaling(4.0, 64, 1.5)],
    ids=str,
)
def test_llama_cpp_turns_as_we_do_and_we_read_what_we_wrote(shape, scaling, tmp_path):
    model = toy_model(replace(shape, rope_scaling=scaling))
    write_gguf(from_model(model), tmp_path / "m.gguf", kind=Kind.F32, tokenizer={})
    expected = llama_cpp_tables(tmp_path / "m.gguf", 201)
    for table, column in zip(rope_tables(model.config, torch.tensor([[201]])), expected, strict=True):
        assert table.flatten().numpy() == pytest.approx(column, abs=3e-5)
    back = load_model(tmp_path / "m.gguf")
    torch.testing.assert_close(rope_frequencies(back.config), rope_frequencies(model.config), atol=0, rtol=1e-6)
    assert rope_attention(back.config) == pytest.approx(rope_attention(model.config), rel=1e-6)
    assert type(back.config.rope_scaling) is type(scaling)
    assert equal_weights(model, back)


def written(tmp_path, **entries):
    file = tmp_path / "m.gguf"
    more = {f"llama.{key.replace('__', '.')}": value for key, value in entries.items()}
    write_gguf(from_model(toy_model(SHAPE)), file, kind=Kind.F32, tokenizer=more)
    return file


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"rope__scale_linear": 4.0}, LinearScaling(4.0)),
        ({"rope__scaling__factor": 4.0}, LinearScaling(4.0)),
        ({"rope__scaling__factor": 3.0, "rope__scale_linear": 4.0}, LinearScaling(3.0)),
        ({"rope__scaling__factor": 0.1}, LinearScaling(0.1)),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__factor": 0.0}, None),
        ({"rope__scaling__factor": 1.0, "rope__scaling__type": "yarn"}, None),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0}, YarnScaling(8.0, 256)),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0, "rope__scaling__finetuned": True,
          "rope__scaling__original_context_length": 32, "rope__scaling__yarn_beta_fast": 32.0}, YarnScaling(8.0, 32)),
    ],
)  # fmt: skip
def test_entries_of_other_converters_mean_what_they_mean_to_llama_cpp(entries, expected, tmp_path):
    file = written(tmp_path, **entries)
    config = read_config(file)
    assert config.rope_scaling == expected
    for table, column in zip(rope_tables(config, torch.tensor([[201]])), llama_cpp_tables(file, 201), strict=True):
        assert table.flatten().numpy() == pytest.approx(column, abs=3e-4)  # angles up to 2,010


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"rope__scaling__type": "longrope"}, r'RoPE scaling "longrope"; computed here are'),
        ({"rope__scaling__type": 7}, r"RoPE scaling 7; computed here are"),
        ({"rope__scaling__factor": "4"}, r'llama\.rope\.scaling\.factor is "4"; it must be a number'),
        ({"rope__scaling__factor": float("nan")}, r"llama\.rope\.scaling\.factor is NaN; it must be a number"),
        ({"rope__scaling__factor": -4.0}, r"the factor of RoPE scaling is -4\.0; it must be above 0"),
        ({"rope__scaling__attn_factor": 1.5}, r"scaled by linear, factor 1, attn_factor 1\.5, which is not computed"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__yarn_beta_fast": 16.0},
         r"yarn, factor 4, attn_factor 1, rope\.scaling\.yarn_beta_fast 16\.0, which is not computed here"),
        ({"rope__freq_base": 0.0}, r"rope_theta is 0\.0; it must be above 1"),
        ({"context_length": -1}, r"llama\.context_length is -1; it must be a whole number"),
        ({"attention__head_count": True}, r"llama\.attention\.head_count is true; it must be a whole number"),
        ({"attention__layer_norm_rms_epsilon": -1.0}, r"norm_eps is -1\.0; it must be above 0"),
    ],
)  # fmt: skip
def test_what_is_not_computed_or_no_number_is_refused_with_its_value(entries, said, tmp_path):
    file = written(tmp_path)
    reader, changed = gguf.GGUFReader(file), tmp_path / "changed.gguf"
    writer = gguf.GGUFWriter(changed, "llama")
    new = {f"llama.{key.replace('__', '.')}": value for key, value in entries.items()}
    for key, field in reader.fields.items():
        if key.startswith("llama.") and key not in new:
            writer.add_key_value(key, field.contents(), field.types[0])
    kinds = {bool: "BOOL", int: "INT32", float: "FLOAT32", str: "STRING"}
    for key, value in new.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=said) as error:
        read_config(changed)
    assert str(error.value).startswith(str(changed))


def test_two_scalings_in_one_file_are_refused(tmp_path):
    write_gguf(from_model(toy_model("llama3.1-8b")), tmp_path / "m.gguf", kind=Kind.F32,
               tokenizer={"llama.rope.scaling.factor": 2.0})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"scaled by linear, factor 2, attn_factor 1 and by rope_freqs\.weight"):
        read_config(tmp_path / "m.gguf")


def test_yarn_that_llama_cpp_cannot_compute_is_refused_and_dynamic_is_said(tmp_path, fresh_warnings):
    for scaling in (YarnScaling(4.0, 64, beta_fast=16.0), YarnScaling(4.0, 64, truncate=False)):
        save_hf(toy_model(replace(SHAPE, rope_scaling=scaling)), tmp_path / "hf")
        with pytest.raises(CheckpointError, match=r"llama\.cpp computes it with 32, 1 and true only: convert to hf"):
            convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf")
    save_hf(toy_model(replace(SHAPE, rope_scaling=DynamicScaling(4.0))), tmp_path / "dynamic")
    assert not any("dynamic'" in said for said in fresh_warnings())
    convert(tmp_path / "dynamic", tmp_path / "m.gguf", to="gguf")
    assert any("'dynamic', which llama.cpp has not; the GGUF file says none" in said for said in fresh_warnings())
    assert read_config(tmp_path / "m.gguf").rope_scaling is None
    with pytest.raises(CheckpointError, match=r"Meta's params\.json has no place for the RoPE scaling"):
        convert(tmp_path / "dynamic", tmp_path / "meta", to="meta")
