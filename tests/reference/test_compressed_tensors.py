"""Quantised models: transformers and compressed-tensors compute our logits from our files, and we theirs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from helpers.subjects import byte_level
from helpers.toys import toy_model
from safetensors.torch import load_file, save_file

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model, open_weights
from arriero.checkpoint.quantize import quantize
from arriero.model.config import LlamaConfig

pytest.importorskip("compressed_tensors", reason="of the extra dev")

SHAPE = LlamaConfig(64, 2, 4, 2, 96, 211, 64, tied_embeddings=True)
TOKENS = torch.randint(211, (3, 31), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keep_head", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_transformers_computes_our_logits(kind, keep_head, tmp_path):
    save_hf(toy_model(SHAPE), tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "q", type=kind, keep_head=keep_head)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert "weight_packed" in dict(reference.model.layers[1].mlp.down_proj.named_parameters())
    ours = load_model(tmp_path / "q", dtype=torch.float32)
    torch.testing.assert_close(ours(TOKENS), reference(TOKENS).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_transformers_computes_our_logits_where_some_matrices_are_wider(tmp_path):
    tokenizer = byte_level()
    save_hf(toy_model(replace(SHAPE, vocab_size=tokenizer.vocab_size)), tmp_path / "m", tokenizer)
    found = quantize(tmp_path / "m", tmp_path / "q", type="int4", budget_mb=0.08)
    assert {matrix.kind for matrix in found.matrices} == {"int4", "int8"}
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours = load_model(tmp_path / "q", dtype=torch.float32)
    torch.testing.assert_close(ours(TOKENS), reference(TOKENS).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 0])
@torch.no_grad()
def test_what_compressed_tensors_packs_is_read_as_it_reads_it(bits, symmetric, group, tmp_path):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Packer
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if bits == 8 and not symmetric:
        pytest.skip("zero points are read with four bits")
    width = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **width)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    save_hf(toy_model(SHAPE), tmp_path)
    state, expected = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        linear, weight = name.removesuffix(".weight"), state.pop(name)
        groups = weight.view(len(weight), -1, group or weight.shape[1])
        parts = {"weight": weight, "weight_scale": groups.abs().amax(2) / (7 if bits == 4 else 127)}
        if not symmetric:
            generator = torch.Generator().manual_seed(len(name))
            parts["weight_zero_point"] = torch.randint(-3, 4, groups.shape[:2], generator=generator).to(torch.int8)
        packed = Packer.compress(parts, scheme)
        expected[name] = Packer.decompress(dict(packed), scheme)["weight"]
        state |= {f"{linear}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    groups = {"group_0": json.loads(scheme.model_dump_json())}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = open_weights(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights.read(name), tensor, rtol=1e-6, atol=1e-7)
    if not symmetric:
        return  # transformers 5.23 makes room for unpacked zero points, and cannot load packed ones
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(load_model(tmp_path)(TOKENS), reference(TOKENS).logits, atol=2e-5, rtol=0)


def test_awq_is_read_as_compressed_tensors_converts_it(tmp_path):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from helpers.gptq import quantized

    quantized("awq", tmp_path)
    weights = open_weights(tmp_path)
    converted = AutoAWQConverter(group_size=32).process(load_file(tmp_path / "model.safetensors"))
    for linear in [name.removesuffix(".weight_packed") for name in converted if name.endswith(".weight_packed")]:
        packed, shape, scale = (converted[f"{linear}.weight_{part}"] for part in ("packed", "shape", "scale"))
        codes = unpack_from_int32(packed, 4, shape).float()
        zeros = unpack_from_int32(converted[f"{linear}.weight_zero_point"], 4, scale.shape, packed_dim=0).float()
        expected = (codes - zeros.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
        torch.testing.assert_close(weights.read(f"{linear}.weight"), expected, rtol=1e-5, atol=1e-6)
