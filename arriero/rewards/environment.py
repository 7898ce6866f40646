"""Environments: what replies to an answer, and waits for the next one, until the episode is over.

    class Guess(Environment):
        def __init__(self, row, rng):
            self.secret = rng.randint(1, 9)

        def turn(self, answer):
            if answer.strip() == str(self.secret):
                return Turn(reward=1.0)
            return Turn("No. Guess again.")

An episode begins with the prompt of a row; `turn` is given each answer of the model and says what it is worth (rewards
of an episode add up) and what is said next. `open_environment` makes a `Scorer` of such a class, whose scores carry
replies; an answer that was cut off ends its episode without being shown. So a run that is scored by a rule and one that
plays are sampled, scored and journaled by the same code.

Environments run in processes beside this one, each turn within a limit of time. A hang is a timeout, an exception a
crash: both end that episode, are worth 0 and are recorded. An episode stays in one process; where that was killed the
episode is played again from its answers in a new one, and so is that of a run which goes on from its journal. So an
environment has to be a function of its row, `rng` and the answers.

Price: 0.1 ms a turn beside the environment's own work, half a second to start a process.
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from arriero.errors import ConfigError, DataError, UserError, did_you_mean
from arriero.rewards.base import CUT, Answer, Reply, Score, Scorer
from arriero.rewards.isolated import START, Process
from arriero.show.terminal import warn_once

BUILT_IN = {
    "guess-number": "a number to find by hints, for rows of `arriero data build tasks guess-number`",
    "reasoning-gym": "reasoning-gym:TASK, again and again until it is right, for rows of `arriero data build tasks`",
}
"""Environments that come along, by the text before the first colon."""


@dataclass(frozen=True)
class Turn:
    """What an environment makes of an answer.

    reply: what it says to it, a text or messages (of a tool, for one: {"role": "tool", "content": ...}); None ends the
    episode. reward: what this turn adds. note: a few words for the journal.
    """

    reply: Reply | None = None
    reward: float = 0.0
    note: str = ""


class Environment:
    """One episode."""

    def __init__(self, row: Mapping[str, Any], rng: random.Random) -> None:
        """row: the columns of the prompt's row. rng: all chance; the same for all answers to a prompt in a step."""

    def turn(self, answer: str) -> Turn:
        """Take the model's answer."""
        raise NotImplementedError


def open_environment(spec: str, seconds: float) -> Scorer:
    """The environment that a text names: FILE.py:CLASS, or one of `BUILT_IN`. seconds: what a turn may take.

    Raises `ConfigError` for a text that names none, and `UserError` where what it needs is missing.
    """
    path, _, _ = spec.rpartition(":")
    kind = spec.partition(":")[0]
    if not path.endswith(".py") and kind not in BUILT_IN:
        raise ConfigError(
            f"environment is {spec!r}; write FILE.py:CLASS, or one of {', '.join(BUILT_IN)}"
            f"{did_you_mean(kind, BUILT_IN)}"
        )
    return Environments(spec, seconds)


class Environments(Scorer):
    """Plays episodes in `workers` processes of `playing.py`."""

    def __init__(self, spec: str, seconds: float, workers: int = 0) -> None:
        self._seconds = seconds
        command = [sys.executable, "-m", "arriero.rewards.playing", spec]
        self._stages = [_Stage(command) for _ in range(workers or min(os.cpu_count() or 1, 4))]
        self._stages[0].process.begin()

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        waiting = [self._stage_of(a).thread.submit(self._one, a) if a.finished else None for a in answers]
        return [CUT if each is None else each.result() for each in waiting]

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """An episode has to begin with the row."""
        said = self._stages[0].process.ask({"check": dict(row)}, START)
        if said:
            why = said.get("refused", said.get("note"))
            raise DataError(f"{where}: the environment does not begin ({why}); mend the row, or its __init__")

    def close(self) -> None:
        """End the processes."""
        for stage in self._stages:
            stage.thread.shutdown(cancel_futures=True)
            stage.process.kill()

    def _stage_of(self, answer: Answer) -> _Stage:
        return self._stages[zlib.crc32(_episode(answer).encode()) % len(self._stages)]

    def _one(self, answer: Answer) -> Score:
        said = self._stage_of(answer).turn(answer, self._seconds)
        if "refused" in said:
            raise UserError(f"{answer.where}: {said['refused']}")
        if said["outcome"] == "crash":
            warn_once(f"an environment crashed, which ends its episode: {said['note']}")
        return Score(said["value"], said["outcome"], said["note"], said.get("reply"))


class _Stage:
    """A process, the thread that waits for it, and the episodes that it has begun."""

    def __init__(self, command: list[str]) -> None:
        self.process, self.thread = Process(command), ThreadPoolExecutor(1, "environment")
        self._known: set[str] = set()
        self._begun = 0

    def turn(self, answer: Answer, seconds: float) -> dict[str, Any]:
        """What the environment says; one that has to be played again may take as long for each answer."""
        if self._begun != self.process.begun:
            self._known, self._begun = set(), self.process.begun
        episode = _episode(answer)
        limit = seconds if episode in self._known else seconds * (len(answer.earlier) + 1)
        message = {
            "episode": episode, "row": dict(answer.row), "seed": answer.seed, "answers": [*answer.earlier, answer.text]
        }  # fmt: skip
        said = self.process.ask(message, limit)
        (self._known.add if said.get("reply") is not None else self._known.discard)(episode)
        return said


def _episode(answer: Answer) -> str:
    return f"{answer.where} {answer.seed} {answer.number}"
