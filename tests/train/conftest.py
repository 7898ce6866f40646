"""A toy Llama with the real tokenizer, in a directory as the Hub would give it, and rows to learn from."""

import json
from pathlib import Path

import pytest

from arriero.checkpoint.hf import save_hf
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory, smollm2_gguf) -> Path:
    tokenizer = load_tokenizer(smollm2_gguf)
    shape = LlamaConfig(22, 2, 11, 11, 29, tokenizer.vocab_size, 2048, tied_embeddings=True)
    directory = tmp_path_factory.mktemp("toy") / "model"
    save_hf(Llama(shape).init_weights(seed=3), directory, tokenizer)
    return directory


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i} + 2?"}, {"role": "assistant", "content": f"{i} + 2 = {i + 2}"}]}
        for i in range(61)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
