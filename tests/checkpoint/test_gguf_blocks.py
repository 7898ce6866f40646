"""Matrices in GGUF's blocks: the integers that were chosen, for the gguf package too, and those in files of others."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from helpers.toys import toy_model

from arriero.checkpoint.convert import convert
from arriero.checkpoint.gguf import write_gguf
from arriero.checkpoint.gguf_blocks import KINDS, fits, packed, unpacked
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, load_model, open_weights
from arriero.checkpoint.quantize import quantize
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig
from arriero.quant.packed import from_indices
from arriero.quant.rounding import nearest

Kind = gguf.GGMLQuantizationType
SHAPE = LlamaConfig(64, 2, 4, 2, 96, 211, 64, tied_embeddings=True)


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_gguf_package_reads_the_integers_that_were_chosen(kind):
    if kind == "int4-affine":
        codes = torch.randint(16, (13, 96), generator=torch.Generator().manual_seed(1))
        held = from_indices(kind, codes, matrix(13, 3).half().float(), matrix(13, 3).half().float())
    else:
        held = nearest(matrix(13, 96), kind)
    assert fits(held)
    raw = packed(held)
    np.testing.assert_array_equal(gguf.quants.dequantize(raw, KINDS[kind]), held.dense().numpy())
    back = unpacked(raw, KINDS[kind], held.shape)
    assert torch.equal(back.codes, held.codes)
    assert torch.equal(back.dense(), held.dense())


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q5_0, Kind.Q5_1])
def test_a_file_of_each_type_is_read_as_the_package_reads_it(kind, tmp_path):
    model = toy_model(SHAPE)
    write_gguf(from_model(model), tmp_path / "m.gguf", kind=kind, tokenizer={})
    weights = open_weights(tmp_path / "m.gguf")
    for name, tensor in model.state_dict().items():
        if name not in weights.entries or tensor.dim() < 2:
            continue
        rows = tensor.numpy()  # q and k are permuted by rows, which blocks do not cross
        expected = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
        np.testing.assert_array_equal(weights.read(name).numpy(), expected)
        held = weights.packed(name)
        assert (held is None) == (kind in (Kind.Q5_0, Kind.Q5_1))
        if held is not None:
            np.testing.assert_array_equal(held.dense().numpy(), expected)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "q8_0"), ("int4", "q4_0")])
def test_what_was_chosen_is_what_a_gguf_file_holds_by_either_way(kind, dtype, tmp_path):
    save_hf(toy_model(SHAPE), tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "q", type=kind)
    chosen = open_weights(tmp_path / "q")
    quantize(tmp_path / "m", tmp_path / "direct.gguf", type=kind, format="gguf")
    convert(tmp_path / "q", tmp_path / "later.gguf", to="gguf", dtype=dtype)
    for file in ("direct.gguf", "later.gguf"):
        reader = gguf.GGUFReader(tmp_path / file)
        types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        assert types["blk.1.attn_q.weight"] is types["output.weight"] is KINDS[kind]
        assert int(reader.get_field("general.file_type").contents()) == {"int8": 7, "int4": 2}[kind]
        weights = open_weights(tmp_path / file)
        for name in chosen.entries:
            if (expected := chosen.packed(name)) is not None:
                assert torch.equal(weights.packed(name).dense(), expected.dense()), name


def test_the_built_in_model_is_at_hand_as_it_is_stored(smollm2_gguf):
    weights = open_weights(smollm2_gguf)
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.7.mlp.down_proj.weight"):
        held = weights.packed(name)
        assert held.kind == "int4-affine"
        assert torch.equal(held.dense(), weights.read(name))
    assert weights.packed("model.norm.weight") is None
    model, tokenizer = load(
        smollm2_gguf, dtype=torch.float32
    )  # with embeddings in Q8_0, which are looked up, not multiplied
    assert model.tied
    with torch.no_grad():
        logits = [m(torch.tensor([[1, 17, 19]])) for m in (model, load_model(smollm2_gguf))]
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
    assert tokenizer.eos_id == 2


def test_what_blocks_do_not_hold_is_refused(tmp_path):
    held = nearest(matrix(3, 64), "int8")
    assert not fits(from_indices("int8", held.codes, held.scales * 1.0001))
    assert not fits(nearest(matrix(3, 64), "nf4"))
    assert not fits(nearest(matrix(3, 48), "int8"))
    save_hf(toy_model(SHAPE), tmp_path / "m")
    for how, said in (
        ({"type": "nf4", "format": "gguf"}, "GGUF has no NF4; take --type int4"),
        ({"format": "gguf"}, "a GGUF file is written; give it a name that ends in .gguf"),
        ({"format": "awq"}, "no format 'awq' to write; known are compressed-tensors, gguf"),
    ):
        with pytest.raises(CheckpointError, match=said):
            quantize(tmp_path / "m", tmp_path / "out", **how)
    save_hf(toy_model(LlamaConfig(48, 1, 2, 1, 64, 211, 64)), tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="has rows of 48; Q8_0 needs multiples of 32"):
        quantize(tmp_path / "narrow", tmp_path / "n.gguf", type="int8", format="gguf")
    with pytest.raises(CheckpointError, match="q4_1 is a type of GGUF files; hf holds f32, f16 or bf16"):
        convert(tmp_path / "m", tmp_path / "h", to="hf", dtype="q4_1")


@pytest.mark.parametrize("dtype", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_conversions_to_each_type_are_checked_against_the_source(dtype, tmp_path):
    save_hf(toy_model(SHAPE), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf", to="gguf", dtype=dtype)
    model, held = load_model(tmp_path / "m"), load_model(tmp_path / "m.gguf")
    worst = {"q4_0": 0.13, "q4_1": 0.075, "q5_0": 0.066, "q5_1": 0.037, "q8_0": 0.005}[dtype]
    for name, tensor in model.state_dict().items():
        assert (held.state_dict()[name] - tensor).abs().max() <= worst * tensor.abs().max(), name
