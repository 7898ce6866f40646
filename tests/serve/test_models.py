"""Several models and adapters behind one address: loaded when asked, unloaded when idle, changed in use."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from helpers.serving import Running
from helpers.toys import toy_directory

from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.load import load
from arriero.infer.generate import stream
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.serve import models
from arriero.serve.config import ServeConfig

KEY = {"x-api-key": "k"}
LORA = LoraConfig(rank=2, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def adapters(smollm2_gguf, tmp_path_factory):
    """Two adapters that change much: their directories, and what each says to a prompt."""
    made = {}
    for seed in (1, 2):
        model, tokenizer = load(smollm2_gguf, dtype=torch.float32)
        add_lora(model, LORA, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for p in lora_state(model).values():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        folder = tmp_path_factory.mktemp("adapters") / str(seed)
        save_adapter(lora_state(model), folder, LORA, str(smollm2_gguf))
        again, _ = load(smollm2_gguf, dtype=torch.float32, adapter=folder)
        made[folder] = "".join(stream(again, tokenizer, tokenizer.encode("Llamas are"), max_new_tokens=12))
    return made


@pytest.fixture(scope="module")
def tuned(smollm2_gguf, adapters):
    config = ServeConfig(
        model=(f"base={smollm2_gguf}",), adapter=(f"one={next(iter(adapters))}",), port=0, precision="fp32",
        api_key="k", cache_gb=0.25,
    )  # fmt: skip
    with Running(config) as running:
        yield running


def said(server, model):
    asked = {"model": model, "prompt": "Llamas are", "max_tokens": 12, "temperature": 0}
    status, body, _ = server.call("/v1/completions", asked, KEY)
    return body["choices"][0]["text"] if status == 200 else body["error"]["message"]


def test_an_adapter_is_a_model_of_its_own_name(tuned, adapters):
    assert said(tuned, "one") == next(iter(adapters.values()))
    assert len({said(tuned, "base"), *adapters.values()}) == 3
    listed = {model["id"]: model["parent"] for model in tuned.call("/v1/models", headers=KEY)[1]["data"]}
    assert listed == {"base": None, "one": "base"}


def test_adapters_come_and_go_by_a_route_while_others_run(tuned, adapters):
    _, second = adapters
    before, answers = said(tuned, "one"), []
    threads = [threading.Thread(target=lambda: answers.append(said(tuned, "one"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    status, told, _ = tuned.call("/v1/load_lora_adapter", {"lora_name": "two", "lora_path": str(second)}, KEY)
    assert (status, told) == (200, {"loaded": "two"})
    assert said(tuned, "two") == adapters[second]
    assert tuned.call("/v1/unload_lora_adapter", {"lora_name": "two"}, KEY)[0] == 200
    assert "no model 'two' is served here" in said(tuned, "two")
    for thread in threads:
        thread.join()
    assert answers == [before] * 4


def test_adapters_that_cannot_be_are_refused(tuned, tmp_path, smollm2_gguf):
    def load_as(name, path):
        status, told, _ = tuned.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, KEY)
        return status, told["error"]["message"]

    status, text = load_as("x", tmp_path / "nothing")
    assert status == 400
    assert "nothing" in text
    assert load_as("base", tmp_path) == (400, "'base' is the name of a model; give the adapter another")
    assert tuned.call("/v1/unload_lora_adapter", {"lora_name": "x"}, KEY)[0] == 404
    assert tuned.call("/v1/load_lora_adapter", {"lora_name": "../x", "lora_path": "y"}, KEY)[0] == 400


def test_without_a_key_no_adapter_is_loaded(server):
    status, told, _ = server.call("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"})
    assert (status, told["error"]["type"]) == (403, "permission_error")


def test_a_model_is_unloaded_when_idle_and_loaded_when_asked(smollm2_gguf):
    config = ServeConfig(
        model=(f"a={smollm2_gguf}", f"b={smollm2_gguf}"), port=0, load="asked", idle_unload=1.0, cache_gb=0.1
    )

    def until(model, state):
        end = time.monotonic() + 60
        while server.call("/ready")[1]["models"][model] != state:
            assert time.monotonic() < end
            time.sleep(0.1)

    with Running(config) as server:
        asked = {"model": "a", "prompt": "x", "max_tokens": 2}
        assert server.call("/v1/completions", asked)[0] == 503
        until("a", "ready")
        assert server.call("/v1/completions", asked)[0] == 200
        assert server.call("/ready")[1]["models"]["b"] == "idle"
        until("a", "idle")
        assert server.call("/v1/completions", asked)[0] == 503
        until("a", "ready")
        assert server.call("/v1/completions", asked)[0] == 200


def test_a_model_that_cannot_be_loaded_is_told_and_takes_no_other(tmp_path, smollm2_gguf, capfd):
    (tmp_path / "broken").mkdir()
    config = ServeConfig(
        model=(f"good={smollm2_gguf}", f"bad={tmp_path / 'broken'}"), port=0, load="asked", cache_gb=0.1
    )
    with Running(config) as server:
        asked = {"prompt": "x", "max_tokens": 1}
        for name in ("good", "bad"):
            assert server.call("/v1/completions", {"model": name, **asked})[0] == 503
        while server.call("/ready")[1]["models"]["good"] != "ready":
            time.sleep(0.1)
        while not server.call("/ready")[1]["models"]["bad"].startswith("failed"):
            time.sleep(0.1)
        status, told, _ = server.call("/v1/completions", {"model": "bad", **asked})
        assert status == 500
        assert "no checkpoint known here" in told["error"]["message"]
        assert server.call("/v1/completions", {"model": "good", **asked})[0] == 200
    assert "no checkpoint known here" in capfd.readouterr().err


def test_a_fault_of_ours_while_loading_keeps_its_traceback_and_takes_no_other(smollm2_gguf, capfd, monkeypatch):
    opened = models._open

    def failing(config, name, *rest):
        if name == "bad":
            raise MemoryError("none left")
        return opened(config, name, *rest)

    monkeypatch.setattr(models, "_open", failing)
    config = ServeConfig(model=(f"good={smollm2_gguf}", f"bad={smollm2_gguf}"), port=0, load="start", cache_gb=0.1)
    with Running(config, wait=False) as server:
        while "loading" in (states := server.call("/ready")[1]["models"]).values():
            time.sleep(0.1)
        assert states == {"good": "ready", "bad": "failed: MemoryError: none left"}
        status, told, _ = server.call("/v1/completions", {"model": "bad", "prompt": "x", "max_tokens": 1})
        assert status == 500
        assert "MemoryError" in told["error"]["message"]
        assert server.call("/v1/completions", {"model": "good", "prompt": "x", "max_tokens": 1})[0] == 200
    assert "in failing" in capfd.readouterr().err


SETTINGS = {
    "two of a name": ({"model": ("a/x", "b/x")}, "two models would be served as 'x'; name one: OTHER=b/x"),
    "an adapter of two": ({"model": ("x", "y"), "adapter": ("n=d",)}, "say of which model it is: n@x=d"),
    "an adapter of none": ({"model": ("x",), "adapter": ("n@z=d",)}, "no model is served as 'z'; there are: x"),
    "no adapter's name": ({"model": ("x",), "adapter": ("dir",)}, "write NAME=DIR"),
    "a name of both": ({"model": ("x",), "adapter": ("x=d",)}, "'x' names both a model and an adapter"),
    "a port": ({"port": 70000}, "port is 70000; it is a number from 0"),
    "an origin": ({"allow_origin": ("example.org",)}, "write a scheme and a host"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_are_refused(name):
    from arriero.errors import ConfigError

    settings, text = SETTINGS[name]
    with pytest.raises(ConfigError, match=text):
        ServeConfig(**settings)


def test_files_that_change_behind_a_server_are_never_mixed_with_what_its_engine_holds(smollm2_gguf, tmp_path):
    path = toy_directory(tmp_path / "toy", smollm2_gguf)
    with Running(ServeConfig(model=(f"base={path}",), port=0, cache_gb=0.01)) as server:
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes())
        status, body, _ = server.call("/v1/embeddings", {"model": "base", "input": "x"})
        assert status == 503
        assert "the files of 'base' have changed since it was loaded" in body["error"]["message"]
        assert server.call("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 2})[0] == 200
