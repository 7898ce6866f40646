"""Evaluates a model on conversations with a reference answer: the loss on the reference, and a generated answer.

The last assistant message of a conversation is the reference, what precedes it the prompt. Two things are measured: the
cross-entropy of the reference (teacher-forced, the end-of-turn token included: what fine-tuning lowers), per byte of
the scored tokens; and how the model's own greedy answer compares with the reference.
Price: one packed forward over prompt and reference, then a batched decode of at most `max_new_tokens` a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arriero.data.formats import Conversation
from arriero.data.messages import text_of
from arriero.data.sft_cache import encode_conversation
from arriero.errors import DataError
from arriero.eval.bootstrap import mean, ratio
from arriero.eval.metrics import is_one_sentence, text_scorer
from arriero.eval.packed import scored
from arriero.eval.results import Results, Sample
from arriero.infer.config import SamplingConfig
from arriero.infer.generate import generate
from arriero.losses.lm import IGNORED
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.contents import MARKS

GREEDY = SamplingConfig(temperature=0.0)
PACKED = 2048  # tokens of a teacher-forced forward: short rows share one


@dataclass(frozen=True)
class Example:
    """One conversation: the ids of its prompt, what is read and scored of its reference, and both as text."""

    prompt_ids: list[int]
    inputs: list[int]
    targets: list[int]  # -100 everywhere but on the reference and its end-of-turn token
    answer_tokens: int
    answer_bytes: float
    prompt: str
    reference: str


def answers(
    model: Llama,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    name: str = "",
    max_new_tokens: int = 128,
    batch: int = 16,
    on_rows: Callable[[float], None] = lambda n: None,
) -> Results:
    """Measure a model on conversations that end in a reference answer.

    on_rows: called with the number of rows scored, then again with the number answered (each row counts twice).
    Raises `DataError` for a row without a reference, or too long for the model with its answer.
    """
    began = time.monotonic()
    score = text_scorer()
    rows = [_row(tokenizer, c, model.config.max_context - max_new_tokens) for c in conversations]
    if not rows:
        raise DataError("the data holds no rows; give at least one conversation that ends in an assistant's message")
    costs = []
    for _, bits in scored(model, rows, PACKED):
        costs.append(bits)
        on_rows(1)
    prompts = [row.prompt_ids for row in rows]
    completions = generate(model, tokenizer, prompts, GREEDY, max_new_tokens, batch=batch, on_done=lambda: on_rows(1))
    samples = []
    for row, completion in zip(rows, completions, strict=True):
        text = completion.text.strip()
        one = completion.stopped and is_one_sentence(text)
        scores = {**vars(score(row.reference, text)), "one_sentence": float(one), "stopped": float(completion.stopped)}
        samples.append(Sample(row.prompt, row.reference, text, scores))
    tokens = [row.answer_tokens for row in rows]
    sizes = [row.answer_bytes for row in rows]
    ratios = {"bits_per_token": ratio(costs, tokens), "bits_per_byte": ratio(costs, sizes)}
    ratios |= {key: mean([sample.scores[key] for sample in samples]) for key in samples[0].scores}
    return Results(name, ratios, samples, len(rows), time.monotonic() - began)


def _row(tokenizer: Tokenizer, conversation: Conversation, longest: int) -> Example:
    *before, last = conversation.messages
    reference = text_of(last)
    if not reference.strip():
        raise DataError(
            f"{conversation.where}: its last message holds no text (only tool calls, perhaps), so there is nothing to "
            "compare an answer with; end each row with the wanted answer"
        )
    # The last answer alone is measured, whatever the row says of training.
    measured = [
        {name: value for name, value in message.items() if name not in MARKS} | {"train": message is last}
        for message in conversation.messages
    ]
    ids, trained = encode_conversation(tokenizer, replace(conversation, messages=measured))
    start, end = trained.index(True), len(trained) - trained[::-1].index(True)
    if start > longest:
        raise DataError(
            f"{conversation.where}: its prompt of {start:,} tokens leaves no room for the answer (at most "
            f"{longest:,} fit); shorten the row, or lower max_new_tokens"
        )
    answer = ids[start:end]
    n_bytes = float(tokenizer.text_bytes(answer).sum())
    targets = [IGNORED] * (start - 1) + answer
    return Example(ids[:start], ids[: end - 1], targets, end - start, n_bytes, _prompt_text(before), reference)


def _prompt_text(messages: Sequence[dict[str, Any]]) -> str:
    """What a reader is shown of the prompt: the user's text alone, or every message under its role."""
    if [message["role"] for message in messages] == ["user"]:
        return text_of(messages[0])
    return "\n\n".join(f"{message['role']}: {text_of(message)}" for message in messages)
