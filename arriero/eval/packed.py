"""Cross-entropy of token ids in bits: the forward pass that perplexity and teacher-forced answers share.

Examples are packed end to end in one forward, each attending to itself only, and logits are computed for a chunk of
scored positions at a time: memory is bounded by the token budget, whatever the number of examples.
Shapes: N tokens of a forward, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol, TypeVar

import torch

from arriero.losses.lm import token_logprobs
from arriero.model.layout import Documents
from arriero.model.llama import Llama


class Example(Protocol):
    """Ids that the model reads, and for each the id that should follow, or -100 where none is scored."""

    @property
    def inputs(self) -> list[int]: ...

    @property
    def targets(self) -> list[int]: ...


E = TypeVar("E", bound=Example)


def scored(model: Llama, examples: Iterable[E], budget: int) -> Iterator[tuple[E, float]]:
    """Yield each example, in order, with -log2 p of its scored targets, summed.

    budget: most tokens of one forward; an example longer than that has one for itself.
    """
    for group in _groups(examples, budget):
        yield from zip(group, _bits(model, group), strict=True)


def _groups(examples: Iterable[E], budget: int) -> Iterator[list[E]]:
    group: list[E] = []
    filled = 0
    for example in examples:
        if group and filled + len(example.inputs) > budget:
            yield group
            group, filled = [], 0
        group.append(example)
        filled += len(example.inputs)
    if group:
        yield group


@torch.inference_mode()
def _bits(model: Llama, group: list[E]) -> list[float]:
    device = model.device
    documents = Documents.of([len(example.inputs) for example in group]).to(device)
    tokens = torch.tensor([token for example in group for token in example.inputs], device=device)
    targets = torch.tensor([target for example in group for target in example.targets], device=device)
    hidden = model.model(tokens[None], documents)[0]
    logprobs = token_logprobs(hidden, model.head.weight, targets).chosen.double()
    return [-logprobs[start:end].sum().item() / math.log(2) for start, end in pairwise(documents.bounds)]
