"""Directories of GPTQ and AWQ: read by the formats' definitions, number by number; what is not plain is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.gptq import quantized, set_config
from safetensors.torch import load_file, save_file

from arriero.checkpoint.convert import convert
from arriero.checkpoint.load import load_model, open_weights
from arriero.errors import CheckpointError


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("method", "version"), [("gptq", ""), ("gptq", "gptq_v2"), ("awq", ""), ("awq", "gemm")])
def test_each_number_is_read_as_the_format_defines_it(method, version, symmetric, tmp_path):
    expected = quantized(method, tmp_path, symmetric=symmetric, version=version)
    weights = open_weights(tmp_path)
    for name, matrix in expected.items():
        np.testing.assert_allclose(weights.read(name).numpy(), matrix, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weights.read_rows(name, 3, 7).numpy(), matrix[3:7], rtol=1e-5, atol=1e-6)
        assert weights.packed(name).kind == ("int4" if symmetric else "int4-affine")
    assert weights.packed("lm_head.weight") is None
    assert load_model(tmp_path)(torch.tensor([[3, 5]])).isfinite().all()


def test_it_is_written_as_a_dense_model_and_its_codes_go_to_gguf(tmp_path):
    quantized("gptq", tmp_path / "q", symmetric=True)
    convert(tmp_path / "q", tmp_path / "dense", to="hf")
    convert(tmp_path / "q", tmp_path / "m.gguf", to="gguf", dtype="q4_0")
    source, dense, file = (open_weights(tmp_path / name) for name in ("q", "dense", "m.gguf"))
    for name in source.entries:
        assert torch.equal(dense.read(name), source.read(name))
        if source.packed(name) is not None:
            assert torch.equal(file.packed(name).dense(), source.packed(name).dense())


def test_what_is_not_plain_is_refused_with_a_remedy(tmp_path):
    quantized("gptq", tmp_path)
    for change, said in (
        ({"bits": 3}, "gptq with 3 bits; read are 4: take the model's bf16 version"),
        ({"bits": 4, "checkpoint_format": "marlin"}, 'gptq packed as "marlin"; read is gptq or gptq_v2'),
        ({"checkpoint_format": "gptq", "quant_method": "awq", "version": "gemv"}, 'awq packed as "gemv"; read is gemm'),
    ):
        set_config(tmp_path, change)
        with pytest.raises(CheckpointError, match=said):
            open_weights(tmp_path)
    set_config(tmp_path, {"quant_method": "gptq"})
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    order = state[f"{name}.g_idx"].flip(0).contiguous()
    save_file(state | {f"{name}.g_idx": order}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.g_idx puts inputs into groups out of order \(act-order\)"):
        open_weights(tmp_path).read(f"{name}.weight")
    save_file(state | {f"{name}.scales": torch.ones(3, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.qweight is \[8, 96\], and the scales and zero points"):
        open_weights(tmp_path)
