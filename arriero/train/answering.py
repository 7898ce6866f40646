"""Answers of a model to conversations, for data that is made of a model's own answers: ghost attention, distillation.

An adapter is folded, as in `arriero eval`. Answers that were cut say so, since nothing is learned from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.checkpoint.load import best_device, load
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Completion, Request
from arriero.model.linear import densify
from arriero.show.progress import progress
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat
from arriero.train.recipe import DTYPES

Messages = list[dict[str, Any]]


@dataclass
class Answering:
    """A model that answers conversations. temperature 0 takes the most probable token. seed: of all answers."""

    engine: Engine
    tokenizer: Tokenizer
    max_new_tokens: int
    temperature: float
    seed: int

    def __call__(self, conversations: Sequence[Messages], label: str = "") -> list[Completion]:
        """The answer to each conversation, with a progress bar.

        label: tells these answers' random numbers from those of another call, and the reader what is answered.
        """
        return [answers[0] for answers in self.several(conversations, 1, label)]

    def several(self, conversations: Sequence[Messages], n: int, label: str = "") -> list[list[Completion]]:
        """n answers to each conversation, with a progress bar."""
        requests = [
            Request(
                encode_chat(self.tokenizer, messages),
                self.max_new_tokens,
                SamplingConfig(temperature=self.temperature, seed=drawn(self.seed, label, i)),
                n,
            )
            for i, messages in enumerate(conversations)
        ]
        with progress(f"answering ({label})" if label else "answering", len(requests) * n) as bar:
            return self.engine.generate(requests, on_done=bar.advance)


def open_answering(
    model: str, *, adapter: str, precision: str, chat_template: str, max_new_tokens: int, temperature: float, seed: int,
    at_once: int = 64,
) -> Answering:  # fmt: skip
    """Open a model to answer with. Raises a `UserError` for what cannot be opened."""
    opened, tokenizer = load(
        model, dtype=DTYPES[precision], device=best_device(), adapter=adapter or None, chat_template=chat_template
    )
    engine = Engine(densify(opened).requires_grad_(False), tokenizer, max_running=at_once, step_tokens=512)
    return Answering(engine, tokenizer, max_new_tokens, temperature, seed)


def drawn(seed: int, *what: object) -> int:
    """A number that is a function of the seed and of what is asked, and far from every other's."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
