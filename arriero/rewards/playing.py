"""The process that environments run in: `python -m arriero.rewards.playing SPEC` (see environment.py).

Takes lines of JSON: an episode's row, seed and answers so far. It goes on with the episode where it knows it, and plays
it again where it does not.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError
from arriero.rewards.environment import Environment, Turn
from arriero.rewards.lines import serve
from arriero.rewards.worker import load_function

KEPT = 4096  # episodes, the newest: those that end at the limit of turns are never heard of again

Make = Callable[[Mapping[str, Any], random.Random], Environment]


class Playing:
    """Episodes under way, each with the answers that it has taken."""

    def __init__(self, spec: str) -> None:
        self._make = maker(spec)
        self._open: dict[str, tuple[Environment, list[str]]] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Begin an episode and forget it ("check"), or take the last answer of one."""
        if "check" in message:
            self._make(message["check"], random.Random(0))
            return {}
        answers: list[str] = message["answers"]
        environment, taken = self._open.pop(message["episode"], (None, []))
        if environment is None or taken != answers[:-1]:
            environment, taken = self._make(message["row"], random.Random(message["seed"])), []
        for text in answers[len(taken) :]:
            turn = checked(environment.turn(text))
        if turn.reply is not None:
            self._open[message["episode"]] = environment, answers
            if len(self._open) > KEPT:
                del self._open[next(iter(self._open))]
        return {"value": turn.reward, "outcome": "scored", "note": turn.note[:1000], "reply": turn.reply}


def checked(turn: Any) -> Turn:
    """The turn, with a plain reply. Raises TypeError or ValueError for what is none."""
    if not isinstance(turn, Turn):
        raise TypeError(f"turn returned {turn!r:.80}; return a Turn(reply, reward)")
    if not math.isfinite(turn.reward):
        raise ValueError(f"turn gave the reward {turn.reward}; it has to be a finite number")
    if turn.reply is None or isinstance(turn.reply, str):
        return Turn(turn.reply, float(turn.reward), str(turn.note))
    messages = [dict(message) for message in turn.reply]
    if not messages or not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise ValueError(f"turn replied {turn.reply!r:.80}; messages have a role and a content, both texts")
    if messages[-1]["role"] == "assistant":
        raise ValueError("turn replied with messages that end with the assistant's, who is to answer them")
    return Turn(messages, float(turn.reward), str(turn.note))


def maker(spec: str) -> Make:
    """What begins an episode of the environment that a text names (environment.py)."""
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        made: Make = load_function(Path(path), name, "environment: ", "FILE.py:CLASS")
        return made
    kind, _, argument = spec.partition(":")
    if kind == "guess-number":
        from arriero.rewards.games import GuessNumber

        return GuessNumber
    if kind == "reasoning-gym":
        from arriero.rewards.gym import Gym

        return lambda row, rng: Gym(argument, row)
    raise ConfigError(f"environment is {spec!r}, which is none")


def main() -> None:
    """Answer for the environment that the argument names."""
    serve(lambda: Playing(sys.argv[1]), Playing.answer)


if __name__ == "__main__":
    main()
