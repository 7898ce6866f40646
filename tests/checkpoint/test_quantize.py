"""`arriero quantize`: what is written is what was chosen, every command reads it, and mistakes are named."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.subjects import byte_level
from helpers.toys import equal_weights, toy_model
from safetensors.torch import load_file, save_file

from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model, open_weights
from arriero.checkpoint.merge import merge
from arriero.checkpoint.quantize import quantize
from arriero.cli import main
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.quant.rounding import nearest

KINDS = ("int8", "int4", "nf4")
TIED = LlamaConfig(64, 2, 4, 2, 192, 211, 64, tied_embeddings=True)
LINEAR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "whole"
    save_hf(toy_model(TIED), path)
    return path


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    return {kind: quantize(source, root / kind, type=kind).out for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_read_is_the_rounded_one_and_its_codes_are_at_hand(kind, source, written):
    whole, weights = open_weights(source), open_weights(written[kind])
    assert not weights.config.tied_embeddings
    for name in weights.entries:
        matrix = weights.packed(name)
        if name.endswith("_proj.weight") or name == HEAD:
            expected = nearest(whole.read(EMBEDDINGS if name == HEAD else name), kind)
            assert torch.equal(matrix.codes, expected.codes), name
            assert torch.equal(matrix.scales, expected.scales)
            assert torch.equal(weights.read(name), expected.dense())
            assert torch.equal(weights.read_rows(name, 3, 11), expected.dense()[3:11])
        else:
            assert matrix is None
            assert torch.equal(weights.read(name), whole.read(name).to(torch.bfloat16))


def test_sizes_are_those_of_the_files_and_the_bytes_read_leave_the_embeddings_out(source, tmp_path):
    found = quantize(source, tmp_path / "q", type="int4")
    state = load_file(tmp_path / "q" / "model.safetensors")
    shapes = {name: t for name, t in state.items() if name.endswith("weight_shape")}
    assert found.size[1] == sum(t.nbytes for t in state.values())
    embeddings = state[EMBEDDINGS].nbytes
    assert found.per_token[1] == found.size[1] - embeddings + TIED.dim * 2
    assert len(shapes) == len(found.matrices) == 15
    assert found.per_token[0] == found.size[0] == 2 * TIED.n_params
    assert found.untied


def test_a_head_may_be_left_as_it_is(source, tmp_path):
    found = quantize(source, tmp_path / "q", type="int8", keep_head=True)
    assert not found.untied
    assert len(found.matrices) == 14
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert load_model(tmp_path / "q").config.tied_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_it_converts_and_merges_as_the_dense_model_does(kind, written, tmp_path):
    dense = load_model(written[kind])
    assert equal_weights(dense, load_model(convert(written[kind], tmp_path / "dense", to="hf")))
    convert(written[kind], tmp_path / "m.gguf", to="gguf", dtype="bf16")
    adapted = add_lora(load_model(written[kind]), LoraConfig(rank=3), seed=2)
    with torch.no_grad():
        for p in lora_state(adapted).values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    save_adapter(lora_state(adapted), tmp_path / "adapter", LoraConfig(rank=3), str(written[kind]))
    merge(written[kind], tmp_path / "adapter", tmp_path / "merged")
    tokens = torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "merged")(tokens), adapted(tokens), rtol=1e-4, atol=1e-4)


def test_large_files_are_sharded(written, source, tmp_path, monkeypatch):
    from arriero.checkpoint import quantize as module
    from arriero.checkpoint.hf import write_hf

    def small(*args, **how):
        write_hf(*args, max_shard_bytes=20_000, **how)

    monkeypatch.setattr(module, "write_hf", small)
    quantize(source, tmp_path / "q", type="int4")
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 3
    assert equal_weights(load_model(tmp_path / "q"), load_model(written["int4"]))


def test_the_command_says_what_it_did(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "q"), "--type", "int4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the head was the embeddings, which stay at 16 bits; it is a matrix of its own now" in said
    assert "error by rounding, of the weights" in said
    assert "layer ┃ q ┃ k ┃ v ┃ o ┃ gate ┃ up ┃ down ┃ head" in re.sub(r" +", " ", said)
    assert "a token reads 0.2 MB -> 0.1 MB" in said


def test_mistakes_are_named(source, written, tmp_path):
    narrow = tmp_path / "narrow"
    save_hf(toy_model(LlamaConfig(48, 1, 2, 1, 80, 211, 64)), narrow)
    cases = [
        ((source, tmp_path / "a", "int5"), r"no type 'int5' to quantise to; known are int8, int4, nf4; did you mean"),
        ((source, written["int4"], "int4"), "exists already; choose another name, or give --force"),
        ((source, tmp_path / "a.gguf", "int4"), "compressed-tensors is a directory; give the name of one"),
        ((written["int4"], tmp_path / "a", "int8"), "quantised already .*; quantise the model that it was made from"),
        ((narrow, tmp_path / "a", "int4"), r"q_proj.weight has 48 inputs, and int4 shares .* 32 .*; take int8"),
    ]
    for (model, out, kind), said in cases:
        with pytest.raises(CheckpointError, match=said):
            quantize(model, out, type=kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow"]


def test_a_disk_that_changes_a_byte_is_noticed(source, tmp_path, monkeypatch):
    from arriero.checkpoint import quantize as module

    whole = module.write_hf

    def damaged(*args, check, **how):
        def spoilt(directory: Path) -> None:
            file = directory / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-2 * TIED.dim * TIED.vocab_size // 3] ^= 1
            file.write_bytes(bytes(data))
            check(directory)

        whole(*args, check=spoilt, **how)

    monkeypatch.setattr(module, "write_hf", damaged)
    with pytest.raises(CheckpointError, match=r"read back by other means, .* is not what was chosen"):
        quantize(source, tmp_path / "q", type="int4")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "fp8"}, r'method "fp8"; read are .*: take the model\'s bf16 version, or dequantise it'),
        ({"quant_method": "bitsandbytes"}, r"load it in transformers, call model.dequantize\(\) and save that"),
        ({"quant_method": "hqq"}, "take a GGUF file of the model, or its unquantised version"),
        ({"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}}, 'weights as "float" of 8 bits'),
        ({"config_groups": {"g": {"weights": {"num_bits": 3}}}}, "of 3 bits; read are integers of 4 and 8 bits"),
        ({"format": "marlin-24", "config_groups": {"g": {}}}, 'has the format "marlin-24"; read are pack-quantized'),
        (
            {"config_groups": {"g": {"format": "pack-quantized", "weights": {"num_bits": 4, "actorder": "group"}}}},
            "take a version with actorder 'static'",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(change, said, written, tmp_path):
    config = json.loads((written["int4"] / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        open_weights(tmp_path)


def test_tensors_that_do_not_fit_each_other_are_named(written, tmp_path):
    state = load_file(written["int4"] / "model.safetensors")
    (tmp_path / "config.json").write_text((written["int4"] / "config.json").read_text())
    linear = LINEAR.removesuffix(".weight")

    def message(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            open_weights(tmp_path)
        return str(error.value)

    packed, scale = f"{linear}.weight_packed", f"{linear}.weight_scale"
    without = {name: t for name, t in state.items() if name != f"{linear}.weight_shape"}
    assert "down_proj.weight_shape is missing or holds no shape" in message(without)
    assert "says [64, 4000]" in message(state | {f"{linear}.weight_shape": torch.tensor([64, 4000])})
    assert "with scales [64, 5], which is no matrix in 4 or 8 bits" in message(state | {scale: torch.ones(64, 5)})
    assert "says [64, 192], and its codes are [64, 11]" in message(state | {packed: state[packed][:, :11].contiguous()})
    assert "holds integers, and no scale" in message({name: t for name, t in state.items() if name != scale})
    bad = state[scale].clone()
    bad[3, 0] = torch.nan
    save_file(state | {scale: bad}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.weight holds 32 values that are NaN or infinite"):
        open_weights(tmp_path).read(LINEAR)


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf"])
def test_what_suffers_most_is_wider_as_far_as_the_budget_goes(format, tmp_path):
    save_hf(toy_model(replace(TIED, vocab_size=byte_level().vocab_size)), tmp_path / "m", byte_level())
    suffix = ".gguf" if format == "gguf" else ""
    plain = quantize(tmp_path / "m", tmp_path / f"plain{suffix}", type="int4", format=format)
    budget = plain.per_token[1] + 20_000
    found = quantize(tmp_path / "m", tmp_path / f"wide{suffix}", type="int4", format=format, budget_mb=budget / 1e6)
    assert plain.per_token[1] < found.per_token[1] <= budget
    wider = {matrix.name for matrix in found.matrices if matrix.kind == "int8"}
    assert wider
    groups = [{f"model.layers.{i}.self_attn.{x}_proj.weight" for x in "qkv"} for i in range(2)]
    groups += [{f"model.layers.{i}.mlp.{x}_proj.weight" for x in ("gate", "up")} for i in range(2)]
    assert all(group <= wider or not group & wider for group in groups)
    weights = open_weights(found.out)
    assert {name: weights.packed(name).kind for name in wider} == dict.fromkeys(wider, "int8")
    with pytest.raises(CheckpointError, match=r"a token reads 0.1 MB, and the budget is 0.0 MB; give more"):
        quantize(tmp_path / "m", tmp_path / "none", type="int4", budget_mb=0.01)
    with pytest.raises(CheckpointError, match=r"a budget of 1 MB decides what int4 leaves wider; type is int8"):
        quantize(tmp_path / "m", tmp_path / "none", type="int8", budget_mb=1.0)
