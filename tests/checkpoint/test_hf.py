"""The Hugging Face layout: round trips, shards, damage, and what a failed write leaves behind."""

import json

import pytest
import torch
from helpers.toys import equal_weights, toy_model
from safetensors.torch import load_file, save_file

from arriero.checkpoint.hf import open_hf, read_config, save_hf
from arriero.checkpoint.load import load_model
from arriero.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_round_trip_is_bit_exact(family, dtype, max_shard_bytes, tmp_path):
    model = toy_model(family, dtype)
    save_hf(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    assert equal_weights(model, back)
    tied = back.lm_head.weight.data_ptr() == back.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tied_embeddings


def test_shards_keep_to_their_size_and_the_index_names_each_tensor_once(tmp_path):
    model = toy_model("smollm2-135m")
    save_hf(model, tmp_path, max_shard_bytes=100_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 100_000 for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]  # tied: written once, as the embeddings
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())


def test_saving_over_a_sharded_model_leaves_no_shard_of_it(tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path, max_shard_bytes=100_000)
    (tmp_path / "notes.txt").write_text("mine")
    small = toy_model("smollm2-135m")
    save_hf(small, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert equal_weights(load_model(tmp_path), small)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_dtype_converts_while_writing(tmp_path):
    model = toy_model("llama3-8b")
    save_hf(model, tmp_path, dtype=torch.bfloat16)
    assert equal_weights(load_model(tmp_path), model.to(torch.bfloat16))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_write_that_fails_leaves_the_old_model_whole_and_no_litter(tmp_path):
    old = toy_model("smollm2-135m")
    save_hf(old, tmp_path / "m")

    def fail(name):
        if name.endswith("layers.1.mlp.up_proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_hf(toy_model("llama3-8b"), tmp_path / "m", progress=fail)
    with pytest.raises(KeyboardInterrupt):
        save_hf(toy_model("llama3-8b"), tmp_path / "new", progress=fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert equal_weights(load_model(tmp_path / "m"), old)


def test_rotary_tables_and_the_copy_of_a_tied_head_are_ignored(tmp_path):
    model = toy_model("smollm2-135m")
    save_hf(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    assert equal_weights(load_model(tmp_path), model)


def test_wrong_tensors_are_named(tmp_path):
    save_hf(toy_model("llama3-8b"), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)

    def message(changed):
        save_file(changed, file)
        with pytest.raises(CheckpointError) as error:
            open_hf(tmp_path)
        assert str(tmp_path) in str(error.value)
        return str(error.value)

    missing = {name: t for name, t in state.items() if name != "model.layers.1.mlp.up_proj.weight"}
    assert "missing: model.layers.1.mlp.up_proj.weight" in message(missing)
    extra = state | {"model.layers.0.self_attn.q_proj.bias": torch.ones(3)}
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in message(extra)
    bent = state | {"model.norm.weight": torch.ones(97)}
    assert "model.norm.weight is [97], the config asks for [96]" in message(bent)
    whole_numbers = state | {"model.norm.weight": torch.ones(96, dtype=torch.int64)}
    assert "model.norm.weight has type I64" in message(whole_numbers)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_cut_file_is_refused_by_name(tmp_path, keep):
    save_hf(toy_model("smollm2-135m"), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or cut short"):
        load_model(tmp_path)


def test_a_missing_shard_is_refused_by_name(tmp_path):
    save_hf(toy_model("smollm2-135m"), tmp_path, max_shard_bytes=100_000)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*: no such file, though the index names it"):
        load_model(tmp_path)


def test_broken_config_files_are_refused(tmp_path):
    save_hf(toy_model("smollm2-135m"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(CheckpointError, match="'hidden_size' is missing"):
        read_config(tmp_path)
    for wrong in ("wide", [72], 72.0, True, 0, -1, 2**31, 10**30):
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": wrong}))
        with pytest.raises(
            CheckpointError, match=r"config\.json: hidden_size is .*; it must be a whole number from 1 to"
        ):
            read_config(tmp_path)
    for text, problem in (('{"model', "not valid JSON"), ("[1]", "an object is expected")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="are pickled"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    for wrong in ({}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"a": 1}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=r"index\.json: no 'weight_map' of file names"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)
