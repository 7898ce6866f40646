"""Llama 2's reward of two models (arXiv 2307.09288, section 3.2.3): safety where it matters, else helpfulness.

    R_c = R_s  where the prompt is tagged as one of safety, or R_s < 0.15
          R_h  otherwise
    R   = whiten(logit(R_c))

with R_s and R_h in (0, 1). The models' scores are the logits of these, so logit(R_c) is the score of one of them.
Whitening takes the mean over the answers of a call off and divides by their deviation: a call has to be a whole batch
of PPO. For choosing among answers of several calls it has to stay away (`whiten=False`): kind "llama2-plain".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from arriero.rewards.base import Answer, Score, Scorer

THRESHOLD = 0.15  # of R_s: precision 0.89, recall 0.55 on Meta's safety test set


class Combined(Scorer):
    """The combination of two scorers whose values are logits. A row with a true field `safety` is tagged."""

    def __init__(self, safety: Scorer, helpful: Scorer, whiten: bool = True) -> None:
        self._safety, self._helpful, self._whiten = safety, helpful, whiten

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        pairs = zip(answers, self._safety(answers), self._helpful(answers), strict=True)
        chosen = [_chosen(answer, safe, helpful) for answer, safe, helpful in pairs]
        if not self._whiten:
            return chosen
        whole = [i for i, score in enumerate(chosen) if score.outcome == "scored"]
        for i, value in zip(whole, whitened([chosen[i].value for i in whole]), strict=True):
            chosen[i] = replace(chosen[i], value=value)
        return chosen

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """What both need."""
        self._safety.check(row, where)
        self._helpful.check(row, where)

    def close(self) -> None:
        """Close both."""
        self._safety.close()
        self._helpful.close()


def _chosen(answer: Answer, safe: Score, helpful: Score) -> Score:
    """The score that counts; one that is not there counts as it is, with its outcome."""
    if safe.outcome != "scored":
        return safe
    if answer.row.get("safety") is True or 1 / (1 + math.exp(-max(safe.value, -700.0))) < THRESHOLD:
        return replace(safe, note="safety")
    return replace(helpful, note="helpfulness") if helpful.outcome == "scored" else helpful


def whitened(values: Sequence[float]) -> list[float]:
    """(x - mean) / (deviation + 1e-8), the deviation that of the population; of one value, or equal ones, 0."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / (deviation + 1e-8) for v in values]
