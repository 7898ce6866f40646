"""Verifiers by a rule: the exact text, the number, a pattern.

Each takes the name of the field in the data's row that it compares with. A field may hold a list: any of its values is
right. A hedged answer, which names several, is worth 0 (`final.py`, `numeric.py`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from arriero.errors import DataError
from arriero.rewards import numeric
from arriero.rewards.base import Answer, Score, Verifier, required
from arriero.rewards.final import final_answers


class ByReference(Verifier):
    """1 where the one final answer is a reference, else 0; a subclass says when that is so."""

    def __init__(self, field: str = "answer") -> None:
        self._field = field

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """A reference has to be text."""
        references(row, self._field, where)

    def verify(self, answer: Answer) -> Score:
        """The final answer against each reference."""
        found = final_answers(answer.text)
        if len(found) > 1:
            return Score(0.0, note="several final answers")
        right = self.is_right(found[0], answer.text.strip(), references(answer.row, self._field, answer.where))
        return Score(float(right), note="" if right else f"answered {shortened(found[0])}")

    def is_right(self, final: str, whole: str, wanted: Sequence[str]) -> bool:
        """Whether the final answer, or the whole text, is one of those wanted."""
        raise NotImplementedError


class Exact(ByReference):
    """1 where the final answer is the reference, white space and Unicode's composition apart, else 0."""

    def is_right(self, final: str, whole: str, wanted: Sequence[str]) -> bool:
        """Whether either is the same text as one of those wanted."""
        return any(_same(final, text) or _same(whole, text) for text in wanted)


class Numeric(Verifier):
    """1 where the final number is the reference's value, else 0; exact but for what `numeric.py` allows."""

    def __init__(self, field: str = "answer") -> None:
        self._field = field

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """A reference has to state one number."""
        self._wanted(row, where)

    def verify(self, answer: Answer) -> Score:
        """The last number of the final answer against each reference."""
        found = [numeric.number(text) for text in final_answers(answer.text)]
        stated = found[-1]
        if stated is None:
            return Score(0.0, note="no number, or several to choose from")
        if any(other is None or not numeric.equal(other, stated) for other in found):
            return Score(0.0, note="several final answers")
        right = any(numeric.equal(stated, wanted) for wanted in self._wanted(answer.row, answer.where))
        return Score(float(right), note="" if right else f"answered {shortened(str(stated.value))}")

    def _wanted(self, row: Mapping[str, Any], where: str) -> list[numeric.Number]:
        """The reference's number: of GSM8K's layout, which works it out before "####", the last one."""
        wanted = []
        for text in references(row, self._field, where):
            value = numeric.number(final_answers(text)[-1])
            if value is None:
                raise DataError(
                    f"{where}: {self._field!r} is {text!r:.80}, which states no number; mend it, or score by exact"
                )
            wanted.append(value)
        return wanted


def references(row: Mapping[str, Any], field: str, where: str) -> Sequence[str]:
    """The texts that a field holds: one, or a list of which any is right; a number counts as its text."""
    value = required(row, field, where)
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, str | int | float) or v == "" for v in values):
        raise DataError(f"{where}: {field!r} is {value!r:.80}; make it a text, a number, or a list of these")
    return [str(v) for v in values]


def shortened(text: str, most: int = 40) -> str:
    """The beginning of a text, in quotes, for a note."""
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def _same(a: str, b: str) -> bool:
    return _normal(a) == _normal(b)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
