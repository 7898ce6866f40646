"""What a model says, for the report: held-out prompts answered before and after training, texts that it continues."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from arriero.data.formats import Conversation
from arriero.data.messages import text_of
from arriero.distributed.engine import Engine
from arriero.errors import ConfigError
from arriero.infer.config import SamplingConfig
from arriero.infer.generate import generate
from arriero.io.files import write_jsonl
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer
from arriero.train.metrics import surviving_records

MAX_NEW_TOKENS = 64
CONTINUED = SamplingConfig(temperature=0.8, top_p=0.95, seed=0)


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answer it should get and the one it got."""

    prompt: str
    reference: str
    answer: str


class Asked(Protocol):
    """Held-out rows of prompts with an answer that each should get (`SftDataset`, `PreferenceDataset`)."""

    def __len__(self) -> int: ...

    def last_answer(self, i: int) -> tuple[list[int], list[int]]: ...

    def conversations(self, examples: Sequence[int]) -> list[Conversation]: ...


def answer(model: Llama, tokenizer: Tokenizer, held_out: Asked | None, n: int) -> list[Sample]:
    """Greedy answers to the last turn of the first `n` held-out examples."""
    if held_out is None or n == 0:
        return []
    pairs = [held_out.last_answer(i) for i in range(min(n, len(held_out)))]
    conversations = held_out.conversations(range(len(pairs)))
    greedy = SamplingConfig(temperature=0)
    with _eagerly():
        results = generate(model, tokenizer, [prompt for prompt, _ in pairs], greedy, MAX_NEW_TOKENS)
    return [
        Sample(_asked(conversation), tokenizer.decode(reference[:-1]), result.text)  # without the token that ends it
        for conversation, (_, reference), result in zip(conversations, pairs, results, strict=True)
    ]


def said(engine: Engine, tokenizer: Tokenizer, held_out: Asked, n: int) -> list[str]:
    """Prompt and greedy answer of the first `n` held-out examples, on process 0; every process has to call it."""
    if (model := engine.whole_model()) is None:
        return []
    return [f"{sample.prompt}\n→ {sample.answer}" for sample in answer(model, tokenizer, held_out, n)]


def _asked(conversation: Conversation) -> str:
    """The message before the last answer, if there is one."""
    return text_of(conversation.messages[-2]) if conversation.messages[1:] else ""


def write_samples(run_dir: Path, samples: list[Sample], when: Literal["before", "after"]) -> None:
    """Write samples.jsonl: prompt, reference, and the answers `before` and `after`, whichever are known so far.

    The answers before are written before step 1, so that a resumed run still has them: of the prompts that it began
    with, since `samples` may change on resume. What is not known is left out of the row.
    """
    path = run_dir / "samples.jsonl"
    known = surviving_records(path) if when == "after" else []
    before = {(row.get("prompt"), row.get("reference")): row for row in known}
    rows = [
        before.get((s.prompt, s.reference), {}) | {"prompt": s.prompt, "reference": s.reference, when: s.answer}
        for s in samples
    ]
    write_jsonl(path, rows)


# -- texts that are continued ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A text that the model goes on from, and its tokens."""

    text: str
    ids: list[int]


def encode_prompts(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """What the model goes on from at validations; raises `ConfigError` for what leaves it no room, or is nothing."""
    prompts = [Prompt(text, [*tokenizer.begin_ids, *tokenizer.encode(text)]) for text in texts]
    for prompt in prompts:
        if not 0 < (n := len(prompt.ids)) < context:
            raise ConfigError(
                f"prompts: {prompt.text[:40]!r} has {n:,} tokens; for a context of {context:,} it must have at least "
                "1 and leave room for an answer"
            )
    return prompts


def continuations(engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """Each prompt and how the model goes on, on process 0; every process has to call it."""
    if not prompts:
        return []
    if (model := engine.whole_model()) is None:
        return []
    with _eagerly():
        answers = generate(model, tokenizer, [prompt.ids for prompt in prompts], CONTINUED, MAX_NEW_TOKENS)
    return [prompt.text + answer.text for prompt, answer in zip(prompts, answers, strict=True)]


def _eagerly() -> AbstractContextManager[None]:
    """Leaves compiled blocks aside: text is generated in shapes that would each compile them again."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-untyped-call]
