"""A few held-out prompts answered before and after training, for the report: what the numbers look like as text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from arriero.data.sft import SftDataset
from arriero.infer.generate import generate
from arriero.infer.sample import SamplingConfig
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer

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
        Sample(str(conversation.messages[-2].get("content")), tokenizer.decode(reference), result.text)
        for conversation, (_, reference), result in zip(conversations, pairs, results, strict=True)
    ]


def write_samples(run_dir: Path, before: list[Sample] | None, after: list[Sample]) -> None:
    """Write samples.jsonl: prompt, reference, before (absent where the run was resumed), after."""
    lines = []
    for index, sample in enumerate(after):
        row = {"prompt": sample.prompt, "reference": sample.reference, "after": sample.answer}
        if before is not None:
            row["before"] = before[index].answer
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (run_dir / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
