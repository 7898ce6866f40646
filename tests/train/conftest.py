"""A toy Llama with the real tokenizer, in a directory as the Hub would give it, and rows to learn from."""

import json
from pathlib import Path

import pytest
from helpers.shards import write_documents

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
def rows(tmp_path, own_cache) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i} + 2?"}, {"role": "assistant", "content": f"{i} + 2 = {i + 2}"}]}
        for i in range(61)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def prompts(tmp_path, own_cache) -> Path:
    """23 questions, and five held out beside them."""
    path = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": f"What is {i} + 2?", "answer": str(i + 2)}) + "\n" for i in range(28)]
    path.write_text("".join(rows[:23]))
    (tmp_path / "held-out.jsonl").write_text("".join(rows[23:]))
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """The help topics of Python as two sources, with a vocabulary of 512 learned from them."""
    import pydoc_data.topics

    from arriero.data.sharding import shard_sources
    from arriero.tokenizer.train import learn_llama3

    topics = sorted(pydoc_data.topics.topics.items())
    tokenizer = learn_llama3((text.encode() for _, text in topics), 512, n_special=11)
    folder = tmp_path_factory.mktemp("corpus")
    documents = ((text, "short" if len(text) < 3000 else "long") for _, text in topics)
    out = folder / "shards"
    shard_sources([write_documents(folder / "t.jsonl", documents)], tokenizer, out, validation=0.15, by_source=True)
    return out
