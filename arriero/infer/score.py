"""A reward model, opened: token ids in, a score out, read at the last of them.

    scorer = open_reward_model("out/reward/model")
    ids = scorer.encode([{"role": "user", "content": "Legs?"}, {"role": "assistant", "content": "Four."}])
    scorer([ids, ...])        # fp32 [n]

A score does not depend on padding, on the batch, or on what else is scored: sequences lie end to end and see themselves
only. Those that follow each other and begin alike share the beginning, which is computed once. Whoever asks decides
what an answer that was cut off is worth: it has no terminator, so what is read is no score of an answer.

Price: one forward pass of each token, prompts counted once for the answers that follow them, equal sequences once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.checkpoint.load import best_device, load_model, load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.errors import DataError
from arriero.model.layout import Documents
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_training

TOKENS = 4096  # of a batch, or the longest sequence
WORTH_SHARING = 8  # tokens that two sequences begin with


@dataclass(frozen=True)
class RewardModel:
    """A model with a head of scores, and its tokenizer."""

    model: Llama
    tokenizer: Tokenizer

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """The ids of a conversation that ends with an answer, up to the token that ends it, as in training."""
        found = encode_training(self.tokenizer, messages, tools)
        return found.ids[: len(found.ids) - found.trained[::-1].index(True)]

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The score of each sequence of ids at its last token, fp32 [n] on the CPU.

        Raises `DataError` for an empty one, and for one that is longer than the model's context.
        """
        for i, ids in enumerate(sequences):
            if not 0 < len(ids) <= self.model.config.max_context:
                raise DataError(
                    f"sequence {i} has {len(ids):,} tokens; a reward model of context "
                    f"{self.model.config.max_context:,} scores 1 to as many"
                )
        place = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, sequences)))}  # equal ones are read once
        scores = [self._batch(group) for group in _batches(list(place))]
        return torch.cat(scores)[[place[tuple(ids)] for ids in sequences]] if scores else torch.zeros(0)

    def _batch(self, groups: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> Tensor:
        tokens, lengths, leads, ends = list[int](), list[int](), list[int](), list[int]()
        for shared, sequences in groups:
            lead = -1
            if shared:
                lead = len(lengths)
                lengths.append(shared)
                leads.append(-1)
                tokens += sequences[0][:shared]
            for ids in sequences:
                tokens += ids[shared:]
                lengths.append(len(ids) - shared)
                leads.append(lead)
                ends.append(len(tokens) - 1)
        device = self.model.device
        layout = Documents.of(lengths, leads).to(device)
        hidden = self.model.model(torch.tensor([tokens], device=device), layout)[0, ends]
        return F.linear(hidden.float(), self.model.head.weight.float())[:, 0].cpu()


def open_reward_model(
    name: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> RewardModel:
    """Open a reward model (`arriero reward`, or any of Hugging Face's Llamas for classification with one label).

    dtype: the type to hold the weights in; None keeps the stored one. device: None takes the GPU where there is one.
    Raises `CheckpointError` where it is no such model.
    """
    path = resolve(name)
    model = load_model(path, dtype=dtype, device=device or best_device(), head="score")
    return RewardModel(model, load_tokenizer_at(path))


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, Sequence[Sequence[int]]]]]:
    """Groups of sequences behind a shared beginning (its length, they), as many as a batch has room for."""
    batch, room = list[tuple[int, Sequence[Sequence[int]]]](), TOKENS
    for shared, group in _groups(sequences):
        size = shared + sum(len(ids) - shared for ids in group)
        if batch and size > room:
            yield batch
            batch, room = [], TOKENS
        batch.append((shared, group))
        room -= size
    if batch:
        yield batch


def _groups(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    """Runs of sequences that begin alike, of a batch's size at most; each keeps one token of its own at least."""
    start = 0
    while start < len(sequences):
        shared, size, stop = len(sequences[start]) - 1, len(sequences[start]), start + 1
        while stop < len(sequences):
            common = min(shared, _common(sequences[start], sequences[stop]), len(sequences[stop]) - 1)
            again = (stop - start - 1) * (shared - common)  # tokens that those before it would no longer share
            grown = size + again + len(sequences[stop]) - common
            # twice: what begins with it may share more among itself, as the answers to the next prompt do
            if common < max(WORTH_SHARING, 2 * again) or grown > TOKENS:
                break
            shared, size, stop = common, grown, stop + 1
        yield (shared if stop > start + 1 else 0), sequences[start:stop]
        start = stop


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
