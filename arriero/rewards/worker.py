"""The process that scores answers one at a time: `python -m arriero.rewards.worker JUDGE ARGUMENTS` (see isolated.py).

Reads lines of JSON, writes one for each (lines.py): value, outcome and note, or what a refused row lacks. JUDGES lists
what it can do.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError, DataError, did_you_mean, require
from arriero.io.reading import read_json
from arriero.rewards.base import Answer, Score, Verifier, required
from arriero.rewards.final import final_answers
from arriero.rewards.lines import serve
from arriero.rewards.verifiers import ByReference

_FENCED = re.compile(r"\A\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*\Z", re.DOTALL)


class Regex(Verifier):
    """1 where the whole answer, white space around it apart, matches the pattern in a field of the row."""

    def __init__(self, field: str = "pattern") -> None:
        self._field = field

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """The pattern has to be one of Python's."""
        self._pattern(row, where)

    def verify(self, answer: Answer) -> Score:
        """The whole answer against the pattern."""
        found = self._pattern(answer.row, answer.where).fullmatch(answer.text.strip())
        return Score(float(found is not None))

    def _pattern(self, row: Mapping[str, Any], where: str) -> re.Pattern[str]:
        source = required(row, self._field, where)
        try:
            return re.compile(source)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise DataError(
                f"{where}: {self._field!r} is {source!r:.80}, no regular expression ({error}); mend it"
            ) from error


class JsonSchema(Verifier):
    """1 where the answer is JSON that satisfies the schema: of a field of the row, or of a file for all rows.

    The answer is the JSON text itself, or one fenced block of it. Drafts 4 to 2020-12, by the schema's "$schema";
    nothing is fetched for a "$ref" (package jsonschema).
    """

    def __init__(self, field: str = "schema") -> None:
        self._validators = require("jsonschema.validators", "rl")
        self._registry = require("referencing", "rl").Registry()
        self._errors = require("jsonschema.exceptions", "rl")
        self._field, self._common = field, None
        if field.endswith(".json"):
            self._common = self._validator(read_json(Path(field), refusal=ConfigError), field)

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """The schema has to be one."""
        self._of(row, where)

    def verify(self, answer: Answer) -> Score:
        """The answer, parsed, against the schema."""
        validator = self._of(answer.row, answer.where)
        fenced = _FENCED.match(answer.text)
        try:
            value = json.loads(
                fenced[1] if fenced else answer.text, parse_constant=_no_constant, object_pairs_hook=_once
            )
        except (ValueError, RecursionError) as error:
            return Score(0.0, note=f"no JSON: {str(error)[:60]}")
        fault = next(validator.iter_errors(value), None)
        return Score(1.0) if fault is None else Score(0.0, note=f"at {fault.json_path}: {fault.message}"[:80])

    def _of(self, row: Mapping[str, Any], where: str) -> Any:
        if self._common is not None:
            return self._common
        schema = required(row, self._field, where)
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: {self._field!r} is no JSON ({error}); mend the schema") from error
        return self._validator(schema, f"{where}: {self._field!r}")

    def _validator(self, schema: Any, where: str) -> Any:
        kind = self._validators.validator_for(schema, self._validators.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except (self._errors.SchemaError, RecursionError) as error:
            raise DataError(f"{where} is no JSON schema ({str(error).splitlines()[0][:120]}); mend it") from error
        return kind(schema, registry=self._registry)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return dict(pairs)


class Math(ByReference):
    """1 where the final answer is mathematically equal to the reference, by math-verify (package of that name)."""

    def __init__(self, field: str = "answer") -> None:
        super().__init__(field)
        self._library = require("math_verify", "rl")

    def is_right(self, final: str, whole: str, wanted: Sequence[str]) -> bool:
        """Whether it equals one of those wanted; the limit of time is the process's own."""
        parsed = self._parsed(final)
        references = (self._parsed(final_answers(text)[-1]) for text in wanted)
        return any(self._library.verify(reference, parsed, timeout_seconds=None) for reference in references)

    def _parsed(self, text: str) -> Any:
        boxed = f"\\boxed{{{text}}}" if "$" not in text and "\\boxed" not in text else text
        return self._library.parse(boxed, parsing_timeout=None)


class Gym(Verifier):
    """reasoning-gym's own score of an answer to one of its tasks, from 0 to 1, by the row's `entry`."""

    def __init__(self) -> None:
        self._library = require("reasoning_gym", "rl")

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """The entry has to name a task of reasoning-gym."""
        self._of(row, where)

    def verify(self, answer: Answer) -> Score:
        """The final answer, as the task's scorer sees it; several different ones are worth 0."""
        found = final_answers(answer.text)
        entry, name = self._of(answer.row, answer.where)
        score = self._library.get_score_answer_fn(name)
        return Score(0.0, note="several final answers") if len(found) > 1 else Score(float(score(found[0], entry)))

    def _of(self, row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
        entry = required(row, "entry", where)
        name = entry.get("metadata", {}).get("source_dataset") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DataError(f"{where}: 'entry' is none of reasoning-gym's; make rows by arriero data build tasks")
        return entry, name


class Function(Verifier):
    """What the user's function returns for an `Answer`: a number, or a `Score`."""

    def __init__(self, path: str, name: str) -> None:
        self._function = load_function(Path(path), name)
        self._what = f"{name} of {path}"

    def verify(self, answer: Answer) -> Score:
        """What the function says, checked."""
        value = self._function(answer)
        score = value if isinstance(value, Score) else Score(float(value))
        if not math.isfinite(score.value):
            raise ValueError(f"{self._what} returned {score.value}; a reward is a finite number")
        return score


def load_function(path: Path, name: str, what: str = "reward: ", as_: str = "python:PATH:FUNCTION") -> Any:
    """The function or class `name` of a Python file, which is run. Raises `ConfigError` where there is none.

    what, as_: how messages begin, and how the user names one.
    """
    if not path.is_file():
        raise ConfigError(f"{what}{path}: no such file; write {as_}")
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what}{path} is no Python file; its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what}{path} cannot be imported ({type(error).__name__}: {error}); mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        kind = "function" if as_.endswith("FUNCTION") else "class"
        raise ConfigError(f"{what}{path} has no {kind} {name!r}{did_you_mean(name, names)}")
    return function


JUDGES: dict[str, Callable[..., Verifier]] = {
    "regex": Regex,
    "json-schema": JsonSchema,
    "math": Math,
    "python": Function,
    "reasoning-gym": Gym,
}


def main() -> None:
    """Answer for the judge that the arguments name."""
    serve(lambda: JUDGES[sys.argv[1]](*sys.argv[2:]), _answer)


def _answer(judge: Verifier, message: dict[str, Any]) -> dict[str, Any]:
    if "check" in message:
        judge.check(message["check"], message["where"])
        return {}
    score = judge.verify(Answer(**message))
    return {"value": score.value, "outcome": score.outcome, "note": score.note[:1000]}


if __name__ == "__main__":
    main()
