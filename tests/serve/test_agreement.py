"""One arithmetic: the trainer that made an adapter, the server with it, the server merged, and the export reloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.serving import Running
from helpers.toys import toy_directory
from helpers.training import sft_settings

from arriero.checkpoint.merge import merge
from arriero.export.deliver import adapter_file, export
from arriero.export.prove import missing
from arriero.serve.config import ServeConfig
from arriero.tokenizer.chat import encode_chat
from arriero.train.recipe import execute
from arriero.train.sft import SftRun, build

MESSAGES = [{"role": "user", "content": "17 + 2?"}, {"role": "assistant", "content": "17 + 2 = 19, 日本"}]
NEAR = 1e-4
"""Of ln p, between fp32 programs of two layers; the adapter moves it by thousands of times as much."""


@pytest.fixture(scope="module")
def tuned(smollm2_gguf, tmp_path_factory) -> tuple[Path, Path, list[int], np.ndarray]:
    """A base, an adapter that was trained now, ids, and the ln p that the trainer's own model gives them."""
    folder = tmp_path_factory.mktemp("tuned")
    base = toy_directory(folder / "base", smollm2_gguf)
    sums = [(f"{i} + 2?", f"{i} + 2 = {i + 2}") for i in range(41)]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in sums
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs: list[SftRun] = []

    def kept(*given: Any) -> SftRun:
        runs.append(build(*given))
        return runs[0]

    execute(sft_settings(base, folder / "rows.jsonl", folder / "run", samples=0), "sft", kept)
    tuned = runs[0].tuned
    model, ids = tuned.engine.whole_model(), encode_chat(tuned.base.tokenizer, MESSAGES)
    return base, folder / "run" / "adapter", ids, scored(lambda batch: model.eval()(batch), ids)


def scored(forward, ids: list[int]) -> np.ndarray:
    """ln p of each of `ids` but the first."""
    with torch.no_grad():
        logprobs = forward(torch.tensor([ids]))[0].double().log_softmax(-1)
    return logprobs[torch.arange(len(ids) - 1), ids[1:]].numpy()


def test_all_that_serve_an_adapter_say_what_its_trainer_says(tuned, tmp_path):
    base, adapter, ids, expected = tuned
    merge(base, adapter, tmp_path / "merged")
    config = ServeConfig(
        model=(f"base={base}", f"merged={tmp_path / 'merged'}"), adapter=(f"mine@base={adapter}",), port=0,
        precision="fp32", cache_gb=0.05,
    )  # fmt: skip
    with Running(config) as server:

        def served(name: str) -> np.ndarray:
            body = {"model": name, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
            status, told, _ = server.call("/v1/completions", body)
            assert status == 200, told
            return np.array(told["choices"][0]["logprobs"]["token_logprobs"][1:])

        assert np.abs(served("base") - expected).max() > 0.5  # the adapter says something else
        assert np.abs(served("mine") - expected).max() < NEAR
        assert np.abs(served("merged") - expected).max() < NEAR


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_export_says_what_the_adapters_trainer_says(tuned, tmp_path):
    import peft
    import transformers

    base, adapter, ids, expected = tuned
    export(base, tmp_path / "out", to="transformers", adapter=adapter, proven=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter_file(tmp_path / "out", "transformers")).eval()
    assert np.abs(scored(lambda batch: theirs(batch).logits, ids) - expected).max() < NEAR


@pytest.mark.skipif(missing("llamacpp") is not None, reason="no llama-cpp-python")
def test_llama_cpp_says_what_the_adapters_trainer_says(tuned, tmp_path):
    import llama_cpp

    base, adapter, ids, expected = tuned
    export(base, tmp_path / "out", to="llamacpp", adapter=adapter, dtype="f32", proven=False)
    model = llama_cpp.Llama(
        str(tmp_path / "out/model.gguf"), lora_path=str(adapter_file(tmp_path / "out", "llamacpp")), n_ctx=256,
        logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1,
    )  # fmt: skip
    model.eval(ids)
    logits = torch.from_numpy(np.array(model.scores[: len(ids)]))
    assert np.abs(scored(lambda _: logits[None], ids) - expected).max() < 10 * NEAR
