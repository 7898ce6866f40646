"""Several answers of a model to each prompt, with what a reward gives them: what `arriero data build scored` writes.

A row has `prompt`, `completions` and `scores`, the layout of scored lists, from which `arriero reward` learns every
pair of different scores and `arriero dpo` the best against the worst. Answers without an end are left out, since a row
would show them with one; of equal texts one stays. Prompts whose answers all have one score teach no preference.
Price: K answers a prompt; the prompt is computed once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from arriero.data.prompts import Prompts
from arriero.eval.verified import to_score
from arriero.rewards.base import Scorer
from arriero.train.answering import Answering


def build_scored(
    prompts: Prompts, answering: Answering, scorer: Scorer, n: int
) -> tuple[list[dict[str, Any]], Counter[str], float]:
    """Rows, how many prompts were left out and why, and the mean score of all answers, cut ones included."""
    found = answering.several([prompt.messages for prompt in prompts], n)
    asked = [to_score(prompt, answer) for prompt, answers in zip(prompts, found, strict=True) for answer in answers]
    scored = iter(zip(asked, scorer(asked), strict=True))
    left_out: Counter[str] = Counter()
    rows, total = [], 0.0
    for prompt in prompts:
        kept: dict[str, float] = {}
        for answer, score in (next(scored) for _ in range(n)):
            total += score.value
            if answer.finished and answer.text.strip() and score.outcome == "scored":
                kept.setdefault(answer.text, score.value)
        if len(set(kept.values())) < 2:
            left_out[
                "whose answers all have one score" if kept else "without a finished answer that could be scored"
            ] += 1
            continue
        rows.append(
            {"prompt": prompt.messages, "completions": list(kept), "scores": list(kept.values()),
             "meta": {"source": prompt.where}}
        )  # fmt: skip
    return rows, left_out, total / len(asked)
