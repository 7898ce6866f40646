"""What every source of rewards takes and gives: answers in, as many scores out, in their order.

A score may come with a reply, to which another answer is due: who gives those is an environment, and an answer without
one is an episode of one turn.

A scorer never stalls and never forges. One that runs foreign code does so in processes of its own, within limits of
time; what could not be scored says so in its outcome, which is recorded beside the value: a timeout, a crash and a
wrong answer are three things, though all of them are worth 0. An answer that was cut off at the token limit is worth 0
with the outcome "cut": a score of half an answer would reward luck ("12" cut off "123").

No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from arriero.errors import DataError, did_you_mean

Outcome = Literal["scored", "timeout", "crash", "cut"]
"""scored: the value counts. timeout, crash: of what judges, or of the code under test. cut: the answer has no end."""


@dataclass(frozen=True)
class Answer:
    """An answer to be scored, with the row that its prompt came from."""

    prompt: str | Sequence[Mapping[str, Any]]
    """What was asked: a text, or messages ({role, content})."""
    text: str
    """The answer, without the token that ended it."""
    finished: bool = True
    """Whether the model ended it; False where it was cut off."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the data's row: the reference `answer`, `tests`, `schema` ..."""
    where: str = "the row"
    """Place of the row, for messages: "row 17 of train.jsonl"."""
    earlier: Sequence[str] = ()
    """The answers before it in its episode, to which an environment has replied."""
    seed: int = 0
    """What an environment draws chance from: one for all answers that are compared."""
    number: int = 0
    """Which of those answers it is."""

    def given(self, name: str) -> Any:
        """A field of the row; raises `DataError` where it is missing or null."""
        return required(self.row, name, self.where)


Reply = str | Sequence[Mapping[str, Any]]
"""What an environment says to an answer: the user's next message as text, or messages ({role, content})."""


@dataclass(frozen=True)
class Score:
    """What an answer is worth. value: finite, usually in [0, 1]. note: a few words on why, for reports.

    reply: an environment's, which waits for another answer (environment.py); None: the answer was the last.
    """

    value: float
    outcome: Outcome = "scored"
    note: str = ""
    reply: Reply | None = None


CUT = Score(0.0, "cut", "cut off before its end")


class Scorer:
    """Called with answers, returns as many scores in their order. A context manager: `close` ends its processes."""

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        raise NotImplementedError

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Raise `DataError` where a row lacks what answers to it are scored by. For each row, before any training."""

    def close(self) -> None:
        """End what runs beside this process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Verifier(Scorer):
    """A scorer by a rule that looks at one answer at a time; answers without an end are worth 0."""

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [self.verify(answer) if answer.finished else CUT for answer in answers]

    def verify(self, answer: Answer) -> Score:
        """The score of a finished answer."""
        raise NotImplementedError


def required(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A field of a row; raises `DataError` where it is missing or null."""
    value = row.get(name)
    if value is None:
        raise DataError(
            f"{where}: the field {name!r}, by which answers are scored, is missing{did_you_mean(name, row)}; "
            "add it, or name another field, as in exact:FIELD"
        )
    return value


def shares(scores: Iterable[Score]) -> dict[Outcome, float]:
    """The share of each outcome among scores, for metrics; those that did not occur are left out."""
    outcomes = [score.outcome for score in scores]
    return {outcome: outcomes.count(outcome) / len(outcomes) for outcome in dict.fromkeys(outcomes)}
