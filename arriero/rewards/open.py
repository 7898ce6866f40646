"""From what the user writes to a scorer: `exact`, `numeric:target`, `python:mine.py:reward` ...

KINDS lists what there is; what follows the first colon is the kind's own.
"""

from __future__ import annotations

from collections.abc import Callable

from arriero.errors import ConfigError, check, did_you_mean
from arriero.rewards.base import Scorer
from arriero.rewards.isolated import Isolated
from arriero.rewards.judge import open_judge
from arriero.rewards.llama2 import Combined
from arriero.rewards.sandbox import Limits
from arriero.rewards.unit_tests import UnitTests
from arriero.rewards.verifiers import Exact, Numeric

RULE, CODE, USERS = 2.0, 5.0, 10.0  # seconds an answer, where the caller says nothing

DESCRIPTIONS = {
    "exact[:FIELD]": 'the final answer is the text in the row\'s FIELD ("answer")',
    "numeric[:FIELD]": "the final number is FIELD's, read exactly",
    "math[:FIELD]": "the final answer is mathematically equal to FIELD (package math-verify)",
    "regex[:FIELD]": 'all of the answer matches the pattern in FIELD ("pattern")',
    "json-schema[:FIELD or FILE.json]": 'JSON that satisfies the schema in FIELD ("schema") or in the file',
    "unit-tests[:FIELD]": 'its Python passes the asserts, or {input, output} pairs, in FIELD ("tests"), in a sandbox',
    "reasoning-gym": "reasoning-gym's own scorer, for rows of `arriero data build tasks`",
    "python:PATH:FUNCTION": "what your function returns for an arriero.rewards.base.Answer",
    "model:DIR": "the score of a reward model (`arriero reward`), at the token that ends the answer",
    "judge:URL or judge:FILE.toml": "a model behind an OpenAI-compatible API, by a rubric",
    "llama2:SAFETY,HELPFULNESS": "Llama 2's combination of two rewards, whitened over a batch; llama2-plain: is not",
}
"""How each kind is written, and what it rewards: for `arriero ls rewards`."""


def _function(argument: str, seconds: float) -> Scorer:
    path, colon, name = argument.rpartition(":")
    check(bool(colon and path and name), f"reward is 'python:{argument}'; write python:PATH:FUNCTION")
    return Isolated("python", path, name, seconds=seconds or USERS, takes_cut=True)


def _combined(argument: str, seconds: float, whiten: bool) -> Scorer:
    safety, comma, helpful = argument.partition(",")
    check(bool(comma and safety and helpful), f"reward is 'llama2:{argument}'; write llama2:SAFETY,HELPFULNESS")
    return Combined(open_scorer(safety, seconds), open_scorer(helpful, seconds), whiten)


def _model(name: str, seconds: float) -> Scorer:
    from arriero.rewards.model import ModelScorer  # here: the rules need no torch

    check(bool(name), "reward is 'model:'; write model:DIR, a directory that arriero reward wrote")
    return ModelScorer(name)


KINDS: dict[str, Callable[[str, float], Scorer]] = {
    "exact": lambda field, seconds: Exact(field or "answer"),
    "numeric": lambda field, seconds: Numeric(field or "answer"),
    "math": lambda field, seconds: Isolated("math", field or "answer", seconds=seconds or RULE),
    "regex": lambda field, seconds: Isolated("regex", field or "pattern", seconds=seconds or RULE),
    "json-schema": lambda field, seconds: Isolated("json-schema", field or "schema", seconds=seconds or RULE),
    "unit-tests": lambda field, seconds: UnitTests(field or "tests", Limits(seconds=seconds or CODE)),
    "reasoning-gym": lambda _, seconds: Isolated("reasoning-gym", seconds=seconds or RULE),
    "python": _function,
    "model": _model,
    "judge": open_judge,
    "llama2": lambda argument, seconds: _combined(argument, seconds, whiten=True),
    "llama2-plain": lambda argument, seconds: _combined(argument, seconds, whiten=False),
}
"""Each kind's scorer, of what follows its colon and the seconds that an answer may take (0: the kind's own)."""


def open_scorer(spec: str, seconds: float = 0) -> Scorer:
    """The scorer that a text such as "numeric" or "exact:target" names.

    seconds: what scoring one answer may take; 0 takes the kind's own limit. Raises `ConfigError` for a text that names
    none, and `UserError` where what it needs is missing.
    """
    kind, _, argument = spec.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"{spec!r} is no reward; one begins with {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    check(seconds >= 0, f"the reward's seconds are {seconds}; they must be at least 0 (0: the kind's own limit)")
    return KINDS[kind](argument, seconds)
