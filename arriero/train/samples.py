"""A few held-out prompts answered before and after training, for the report: what the numbers look like as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arriero.data.formats import Conversation, text_of
from arriero.data.sft import SftDataset
from arriero.infer.config import SamplingConfig
from arriero.infer.generate import generate
from arriero.io.files import write_jsonl
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer
from arriero.train.metrics import surviving_records

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answer it should get and the one it got."""

    prompt: str
    reference: str
    answer: str


def answer(model: Llama, tokenizer: Tokenizer, held_out: SftDataset | None, n: int) -> list[Sample]:
    """Greedy answers to the last turn of the first `n` held-out examples."""
    if held_out is None or n == 0:
        return []
    pairs = [held_out.last_answer(i) for i in range(min(n, len(held_out)))]
    conversations = held_out.conversations(range(len(pairs)))
    results = generate(model, tokenizer, [prompt for prompt, _ in pairs], SamplingConfig(temperature=0), MAX_NEW_TOKENS)
    return [
        Sample(_asked(conversation), tokenizer.decode(reference[:-1]), result.text)  # without the token that ends it
        for conversation, (_, reference), result in zip(conversations, pairs, results, strict=True)
    ]


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
