"""Adds rows for the new ids of a grown vocabulary to a checkpoint, and writes it as a Hugging Face directory.

The embedding of a new token is the mean of the embeddings of the base tokens that it replaces, and its row of the head
likewise: at first the model reads it as the average of those tokens and predicts it about as readily. (Hewitt 2021,
"Initializing New Word Embeddings for Pretrained Language Models", shows why a mean and not noise: a random row can take
the probability of all others.) Old rows are unchanged, so texts without new tokens have the same hidden states and the
same logits at old ids.

Price: the two matrices in memory once, in fp32 while means are computed; all else is copied tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.convert import check_destination, tensor_bar
from arriero.checkpoint.hf import write_hf
from arriero.checkpoint.load import open_weights
from arriero.checkpoint.source import resolve
from arriero.checkpoint.tensor_file import Entry
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.extend import Extension
from arriero.tokenizer.load import load_tokenizer


def resized(weights: Weights, n_base: int, parts: Mapping[int, Sequence[int]]) -> Weights:
    """Return `weights` with rows for the new ids `parts`, each the mean of the rows of its parts.

    n_base: ids of the base tokenizer. A checkpoint may have more rows than that (padding); new ids then take those.
    Raises CheckpointError when it has fewer.
    """
    n_rows = weights.config.vocab_size
    if n_rows < n_base:
        raise CheckpointError(
            f"{weights.source}: the model has {n_rows} embeddings, the tokenizer {n_base} ids; extend the tokenizer "
            "that the model was trained with"
        )
    assert all(i >= n_base and ids and max(ids) < n_base for i, ids in parts.items())
    n_new_rows = max(n_rows, max(parts, default=0) + 1)
    entries = dict(weights.entries)
    for name in (EMBEDDINGS, HEAD):
        if name in entries:  # a tied head is not among them
            entries[name] = Entry((n_new_rows, *entries[name].shape[1:]), entries[name].dtype)

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        return _with_rows(tensor, n_new_rows, parts) if name in (EMBEDDINGS, HEAD) else tensor

    return Weights(weights.source, replace(weights.config, vocab_size=n_new_rows), entries, read)


def _with_rows(matrix: Tensor, n_rows: int, parts: Mapping[int, Sequence[int]]) -> Tensor:
    """Return [n_rows, D]: the old rows, then means of them, in the matrix's type."""
    grown = torch.zeros(n_rows, matrix.shape[1], dtype=matrix.dtype)
    grown[: len(matrix)] = matrix
    ids = torch.tensor([i for row in parts.values() for i in row])
    starts = torch.tensor([0, *(len(row) for row in parts.values())]).cumsum(0)[:-1]
    means = torch.nn.functional.embedding_bag(ids, matrix.float(), starts, mode="mean")
    grown[torch.tensor(list(parts))] = means.to(matrix.dtype)
    return grown


def check_request(model: str | Path, dst: Path, base: Tokenizer) -> Path:
    """Return the path of `model` (path, Hub id or built-in name), where it can be resized for a growth of `base`.

    Raises CheckpointError where `dst` is the model itself, or where its tokenizer is not `base`, so that the
    means would be of wrong rows. A model without a tokenizer is accepted unchecked.
    """
    source = resolve(model)
    check_destination(source, dst, force=True)  # writing over the source is refused in any case
    try:
        own = load_tokenizer(source)
    except CheckpointError:
        return source
    if not (own.holds(base) and base.holds(own)):
        raise CheckpointError(
            f"{model} has its own tokenizer ({own.vocab_size:,} ids), and the one to extend ({base.vocab_size:,} ids) "
            "gives other ids; extend the model's own"
        )
    return source


def resize(model: str | Path, dst: Path, base: Tokenizer, extension: Extension) -> None:
    """Write `model` at `dst` with rows for the new ids, and the grown tokenizer; see `check_request`.

    All or nothing, in Hugging Face's layout and the stored number type (quantised weights become f32), with progress.
    """
    source = check_request(model, dst, base)
    weights = resized(open_weights(source), base.vocab_size, extension.parts)
    with tensor_bar(f"{source.name} -> {weights.config.vocab_size:,} ids", len(weights.entries)) as progress:
        write_hf(weights, dst, tokenizer=extension.tokenizer, beside=read_beside(source), progress=progress)
