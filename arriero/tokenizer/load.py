"""Loads a tokenizer from files, by the family that reads them."""

from __future__ import annotations

from pathlib import Path

from arriero.errors import CheckpointError
from arriero.io.paths import as_path, hint
from arriero.tokenizer import gguf, hf, llama3, sentencepiece, vocabulary
from arriero.tokenizer.base import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them makes a directory a tokenizer's


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory, a tokenizer.json, a tokenizer.model or a .gguf file.

    A tokenizer.model is SentencePiece (Llama 1 and 2) or tiktoken's format (Llama 3); its content decides. In a
    directory with vocab.json and merges.txt only, tokenizer_config.json names the class, and so the pipeline.
    Raises CheckpointError where there is none, or where it cannot be read.
    """
    path = as_path(path)
    if path.is_dir():
        found = next((name for name in TOKENIZER_FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(
                f"{path}: no tokenizer.json or tokenizer.model in this directory, nor vocab.json with merges.txt"
            )
        path = path / found
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; give a model directory, tokenizer.json, tokenizer.model or .gguf{hint(path)}"
        )
    if path.suffix == ".gguf":
        return gguf.load_gguf_tokenizer(path)
    if path.name == "vocab.json":
        return vocabulary.load_vocab_and_merges(path.parent)
    if path.suffix == ".json":
        return hf.load_tokenizer_json(path)
    if llama3.is_tiktoken_file(path):
        return llama3.load_tiktoken_model(path)
    return sentencepiece.load_sentencepiece_model(path)
