"""Games of several turns that need nothing but this package; rows are made by `arriero data build tasks`."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from arriero.rewards.environment import Environment, Turn


class GuessNumber(Environment):
    """A number from `low` to `high` to be guessed in `tries` answers, each of which is told whether it lies higher.

    The reward is 1 for finding it. An answer without exactly one whole number is a lost try. What is sought is drawn
    for each episode: no row can be learned by heart.
    """

    def __init__(self, row: Mapping[str, Any], rng: random.Random) -> None:
        self._low, self._high, self._left = int(row["low"]), int(row["high"]), int(row["tries"])
        self._secret = rng.randint(self._low, self._high)

    def turn(self, answer: str) -> Turn:
        """Whether it is the number, or where that lies."""
        self._left -= 1
        numbers = re.findall(r"\d+", answer)
        guess = int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 10 else None
        if guess == self._secret:
            return Turn(reward=1.0)
        if not self._left:
            return Turn(note=f"it was {self._secret}")
        if guess is None:
            return Turn("Answer with one number only. Guess again.")
        return Turn(f"The number is {'higher' if guess < self._secret else 'lower'} than {guess}. Guess again.")
