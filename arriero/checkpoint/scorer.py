"""Reward models as Hugging Face's models for sequence classification with one label.

transformers reads the score at the last token that is not padding, whatever token that is. Where a tokenizer pads with
the token that ends an answer, it would pass over the end and read the score before it. So a reward model is written
with a padding token that ends nothing, and every program reads the score where it was trained: at the terminator.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from arriero.checkpoint.beside import Beside
from arriero.checkpoint.export import export_hf
from arriero.distributed.engine import Engine
from arriero.errors import CheckpointError
from arriero.tokenizer.base import Tokenizer


def export_scorer(engine: Engine, directory: Path, tokenizer: Tokenizer, *, dtype: torch.dtype, beside: Beside) -> None:
    """Write a model with a head of scores, its adapter folded in. Every process has to call it."""
    tokenizer = padding_apart(tokenizer)
    told = replace(beside, generation={**beside.generation, "pad_token_id": tokenizer.pad_id})
    export_hf(engine, directory, tokenizer, dtype=dtype, beside=told)


def padding_apart(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a padding token that ends no answer: its own, else another special token.

    Raises `CheckpointError` where it has none.
    """
    if tokenizer.pad_id is not None and tokenizer.pad_id not in tokenizer.stop_ids | tokenizer.control_stops:
        return tokenizer
    free = [text for text, i in tokenizer.special_ids.items() if i not in tokenizer.stop_ids | tokenizer.control_stops]
    if not free:
        raise CheckpointError(
            "the tokenizer has no special token but those that end texts; padded with one of them, transformers would "
            "not read the score at an answer's end: take a tokenizer with a padding token"
        )
    free.sort(key=lambda text: ("pad" not in text.lower(), text == tokenizer.special.bos))
    text = free[0]
    other = copy.copy(tokenizer)
    other.special = replace(tokenizer.special, pad=text)
    other.__dict__.pop("fingerprint", None)
    return other
