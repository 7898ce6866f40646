"""reasoning-gym's tasks as an environment: an answer that is not right may be tried again, as long as turns last.

A task's own scorer gives from 0 to 1. A turn is worth what it adds to the best score so far, so that an episode is
worth its best answer, and none gains by being wrong first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arriero.errors import DataError
from arriero.rewards.base import Answer
from arriero.rewards.environment import Environment, Turn
from arriero.rewards.worker import Gym as Scored


class Gym(Environment):
    """One question, by the row's `entry`."""

    def __init__(self, task: str, row: Mapping[str, Any]) -> None:
        self._scorer, self._row, self._best = Scored(), row, 0.0
        self._scorer.check(row, "the row")
        name = row["entry"]["metadata"]["source_dataset"]
        if task and name != task:
            raise DataError(f"the row is of reasoning-gym's {name}, and the environment is reasoning-gym:{task}")

    def turn(self, answer: str) -> Turn:
        """The score, and another try where it is not full."""
        score = self._scorer.verify(Answer("", answer, row=self._row))
        gained, self._best = max(score.value - self._best, 0.0), max(score.value, self._best)
        if score.value >= 1:
            return Turn(reward=gained)
        return Turn("That is not right. Try again, and give the answer only.", gained, score.note)
