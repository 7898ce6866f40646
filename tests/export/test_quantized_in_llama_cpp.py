"""Quantised GGUF files of ours as llama.cpp opens and runs them, against the engine on the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from arriero.checkpoint.load import load
from arriero.checkpoint.quantize import quantize
from arriero.infer.engine import Engine
from arriero.infer.native_step import NativeStep
from arriero.infer.step import StepInput
from arriero.model.llama import Llama

N = 256  # tokens that both read


def of_engine(model: Llama, ids: list[int]) -> torch.Tensor:
    """ln p [N, V] by the step that the engine runs."""
    step = Engine(model, cache_tokens=512, context=512)._model_step
    assert isinstance(step, NativeStep)
    at = np.arange(N)
    blocks = np.arange(step.n_blocks)[None]
    return step(StepInput(np.array(ids), at, np.zeros(N, int), blocks, at, [None])).log_softmax(-1)


def of_llama_cpp(file: Path, ids: list[int], out: Path) -> torch.Tensor:
    """The same by llama.cpp, in a process of its own."""
    out.mkdir()
    job = {"path": str(file), "adapter": None, "messages": [], "texts": [ids], "tail": N, "n_new": 0, "out": str(out)}
    command = [sys.executable, "-m", "arriero.export.judge", "llamacpp"]
    subprocess.run(command, input=json.dumps(job), text=True, check=True, timeout=900)
    return torch.from_numpy(np.load(out / "tail.npy"))


def kld(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean of KL(p || q) over positions, nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_llama_cpp_says_of_our_file_what_the_engine_says(smollm2_gguf, kind, tmp_path):
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError):
        pytest.skip("no llama-cpp-python here")
    quantize(smollm2_gguf, tmp_path / "q.gguf", type=kind, format="gguf")
    model, tokenizer = load(tmp_path / "q.gguf", dtype=torch.bfloat16)
    ids = tokenizer.encode("\n".join(topics.values())[:4000])[:N]
    exact = (
        load(tmp_path / "q.gguf", dtype=torch.float32)[0].requires_grad_(False)(torch.tensor([ids]))[0].log_softmax(-1)
    )
    ours, theirs = of_engine(model, ids), of_llama_cpp(tmp_path / "q.gguf", ids, tmp_path / "judged")
    found = {"engine": kld(exact, ours), "llama.cpp": kld(exact, theirs), "one from the other": kld(theirs, ours)}
    print(kind, {name: f"{value:.2e}" for name, value in found.items()})
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    assert found["engine"] < 1e-3 and found["one from the other"] < 0.02 and same > 0.9, (found, same)
