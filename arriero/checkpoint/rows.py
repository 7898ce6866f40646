"""Compares the number of rows of a model's embeddings with the ids of its tokenizer: at least as many are needed.

Further rows are padding to a multiple that suits the hardware: no id reads them, `infer/sample.py` never samples them,
and in a GGUF file, where each row is a token, they are named as by llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import CheckpointError

if TYPE_CHECKING:
    from arriero.tokenizer.base import Tokenizer

_UNUSED = 5  # llama.cpp's token type
_NEVER = -10_000.0  # the score that its converter gives such a piece


def check_rows(source: Path, n_rows: int, tokenizer: Tokenizer) -> None:
    """Raise `CheckpointError` where the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > n_rows:
        raise CheckpointError(
            f"{source}: its embeddings have {n_rows:,} rows, and its tokenizer has {tokenizer.vocab_size:,} ids; "
            f"for those from {n_rows:,} on the model has no embedding: use the tokenizer that it was trained with (a "
            "tokenizer and its model are grown together by arriero tokenizer extend --model)"
        )


def with_unused_tokens(entries: Mapping[str, Any], n_rows: int) -> dict[str, Any]:
    """A tokenizer's GGUF metadata with an unused token for each row beyond its own: llama.cpp wants one a row."""
    padded = dict(entries)
    more = range(len(entries["tokenizer.ggml.tokens"]), n_rows)
    for key, values in (
        ("tokens", [f"[PAD{i}]" for i in more]),
        ("token_type", [_UNUSED] * len(more)),
        ("scores", [_NEVER] * len(more)),
    ):
        if (name := f"tokenizer.ggml.{key}") in padded:
            padded[name] = [*padded[name], *values]
    return padded
