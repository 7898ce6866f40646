"""From what the user writes to a scorer: `exact`, `numeric:target`, `python:mine.py:reward` ...

KINDS lists what there is; what follows the first colon is the kind's own.
"""

from __future__ import annotations

from collections.abc import Callable

from arriero.errors import ConfigError, did_you_mean
from arriero.rewards.base import Scorer
from arriero.rewards.verifiers import Exact, Numeric

KINDS: dict[str, Callable[[str], Scorer]] = {
    "exact": lambda field: Exact(field or "answer"),
    "numeric": lambda field: Numeric(field or "answer"),
}

HELP = """exact[:FIELD], numeric[:FIELD]: the final answer is the text, or the number, in the row's FIELD ("answer")"""
"""For the `--help` of commands that take a reward."""


def open_scorer(spec: str) -> Scorer:
    """The scorer that a text such as "numeric" or "exact:target" names; raises `ConfigError` where it names none."""
    kind, _, argument = spec.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"reward is {spec!r}; it begins with one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    return KINDS[kind](argument)
