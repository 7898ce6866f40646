"""Averages: of models by arithmetic on their files, of adapters against the average of the merged models."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.average import average
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model
from arriero.checkpoint.merge import merge
from arriero.errors import CheckpointError, ConfigError
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig

SHAPE = LlamaConfig(dim=22, n_layers=2, n_heads=11, n_kv_heads=11, ffn_dim=29, vocab_size=101, max_context=64)


@pytest.fixture
def models(tmp_path):
    paths = [tmp_path / f"m{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        save_hf(Llama(SHAPE).init_weights(seed=seed), path)
    return paths


def adapter(model, directory, seed, **settings):
    lora = LoraConfig(**settings)
    loaded = load_model(model)
    add_lora(loaded, lora)
    torch.manual_seed(seed)
    save_adapter({n: torch.randn_like(t) * 0.1 for n, t in lora_state(loaded).items()}, directory, lora, str(model))
    return directory


def test_models_are_averaged_tensor_by_tensor(models, tmp_path):
    average(models, tmp_path / "mean", weights=[2, 1, 1])
    found, parts = load_file(tmp_path / "mean/model.safetensors"), [load_file(p / "model.safetensors") for p in models]
    for name, tensor in found.items():
        wanted = parts[0][name] / 2 + parts[1][name] / 4 + parts[2][name] / 4
        torch.testing.assert_close(tensor, wanted, atol=1e-7, rtol=1e-6)


def test_the_average_of_a_model_with_itself_is_the_model(models, tmp_path):
    average([models[0], models[0]], tmp_path / "mean")
    before, after = (load_file(p / "model.safetensors") for p in (models[0], tmp_path / "mean"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_average_of_adapters_adds_the_average_of_what_they_add(models, tmp_path):
    """Of other ranks, scales and targets: the merged average is the average of the merged models."""
    kinds = [{"rank": 3, "alpha": 5.0}, {"rank": 2, "alpha": 7.0, "targets": ("q_proj", "up_proj"), "rslora": True}]
    paths = [adapter(models[0], tmp_path / f"a{i}", i, **kind) for i, kind in enumerate(kinds)]
    average(paths, tmp_path / "mean", weights=[1, 3])
    for i, path in enumerate([*paths, tmp_path / "mean"]):
        merge(models[0], path, tmp_path / f"merged{i}")
    one, two, mean = (load_file(tmp_path / f"merged{i}/model.safetensors") for i in range(3))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, one[name] / 4 + two[name] * 3 / 4, atol=1e-6, rtol=1e-5)


def test_what_does_not_fit_together_is_refused(models, tmp_path):
    other = tmp_path / "other"
    save_hf(Llama(LlamaConfig(22, 3, 11, 11, 29, 101, 64)).init_weights(seed=0), other)
    with pytest.raises(CheckpointError, match=r"other: its tensors are not those of .*m0; only models of one shape"):
        average([models[0], other], tmp_path / "mean")
    with pytest.raises(CheckpointError, match=r"is an adapter and .* is none; merge it first"):
        average([models[0], adapter(models[0], tmp_path / "a", 0)], tmp_path / "mean")
    with pytest.raises(ConfigError, match="2 weights are given for 3 models"):
        average(models, tmp_path / "mean", weights=[1, 2])
    with pytest.raises(ConfigError, match=r"weights are \[1, 0, 1\]; each must be a number above 0"):
        average(models, tmp_path / "mean", weights=[1, 0, 1])
    with pytest.raises(ConfigError, match="1 model is given"):
        average(models[:1], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_config_that_differs_is_refused(models, tmp_path):
    from arriero.io.files import write_json
    from arriero.io.reading import read_json

    config = read_json(models[1] / "config.json")
    write_json(models[1] / "config.json", {**config, "rms_norm_eps": 1e-3})
    with pytest.raises(CheckpointError, match="its config differs from that of"):
        average(models[:2], tmp_path / "mean")


def test_a_value_that_is_not_finite_is_refused_and_leaves_nothing(models, tmp_path):
    file = models[1] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model.norm.weight"):
        average(models[:2], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
