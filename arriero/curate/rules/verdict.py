"""Turns measured numbers of a batch into reasons for dropping that a person can read: "dup_line_frac 0.41 > 0.30"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ConfigError


class Check(NamedTuple):
    """One threshold: a document is dropped where its value ([D]) is on that side of `bound`."""

    name: str
    values: NDArray[Any]
    side: Literal["<", ">"]
    bound: float


def verdicts(checks: Sequence[Check]) -> list[str | None]:
    """For each document the first check that it fails, in words, or None to keep it."""
    reasons: list[str | None] = [None] * len(checks[0].values)
    for check in reversed(checks):
        failed = check.values < check.bound if check.side == "<" else check.values > check.bound
        for document in np.flatnonzero(failed).tolist():
            value = check.values[document]
            reasons[document] = f"{check.name} {_number(value, check.bound)} {check.side} {check.bound:g}"
    return reasons


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """part / whole, [D]; 0 where there is no whole."""
    return part / np.maximum(whole, 1)


def check_bounds(rule: Any, low: float, high: float, *fields: str) -> None:
    """Raise `ConfigError` unless these fields of a rule (in a tuple: each number) are within the bounds."""
    for field in fields:
        value = getattr(rule, field)
        if not all(low <= number <= high for number in (value if isinstance(value, tuple) else (value,))):
            setting = f"{rule.name.replace('-', '_')}.{field}"
            raise ConfigError(f"{setting} is {value}; it must be from {low:g} to {high:g}")


def _number(value: Any, bound: float) -> str:
    """The number with enough digits to show on which side of the bound it is."""
    if isinstance(value, (int, np.integer)):
        return str(value)
    for digits in range(2, 9):
        text = f"{value:.{digits}f}"
        if float(text) != bound:
            break
    return text
