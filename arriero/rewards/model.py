"""A reward model as a scorer: its score of prompt and answer, read at the token that ends the answer.

Answers that were cut have no such token and get none (outcome "cut"); those that do not fit the model's context, or
that its chat template refuses, have crashed. A score is the logit that the model was trained with: only differences
mean something, so rejection sampling by it wants `every_prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence

from arriero.errors import DataError
from arriero.infer.score import open_reward_model
from arriero.rewards.base import CUT, Answer, Score, Scorer


class ModelScorer(Scorer):
    """The scores of the reward model in a directory (or of a Hub id)."""

    def __init__(self, name: str) -> None:
        self._model = open_reward_model(name)

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        scores = [CUT] * len(answers)
        ids: dict[int, list[int]] = {}
        for i, answer in enumerate(answers):
            if answer.finished:
                try:
                    ids[i] = self._encoded(answer)
                except DataError as error:
                    scores[i] = Score(0.0, "crash", str(error)[:100])
        for i, value in zip(ids, self._model(list(ids.values())).tolist(), strict=True):
            scores[i] = Score(value)
        return scores

    def _encoded(self, answer: Answer) -> list[int]:
        asked = [{"role": "user", "content": answer.prompt}] if isinstance(answer.prompt, str) else answer.prompt
        ids = self._model.encode([*asked, {"role": "assistant", "content": answer.text}])
        if len(ids) > (most := self._model.model.config.max_context):
            raise DataError(f"prompt and answer have {len(ids):,} tokens; the reward model's context is {most:,}")
        return ids
