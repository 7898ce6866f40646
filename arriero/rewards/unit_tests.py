"""Code in an answer, tested: 1 where it passes every test of its row, else 0. It runs in a jail (`sandbox.py`).

Tests are Python's asserts (a text, or a list of texts, as MBPP has them; HumanEval's `check(candidate)` with the row's
`entry_point`), or pairs {"input", "output"} of what a program reads and has to print. The row's `setup` runs before.

An assert is taken apart: of `assert f(1) == [2]` the jail gets `f(1)` alone, and the value that comes back is compared
here. So code that looks for the expected value, ends early, or makes objects that equal everything passes nothing. The
right side is computed in another jail, where there is no answer, once for each row. Only what cannot be taken apart (a
loop of asserts, a right side that needs the answer's names) runs beside the answer as a whole, and counts as passed
where it ends without an exception.
"""

from __future__ import annotations

import ast
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from arriero.errors import DataError
from arriero.rewards.base import CUT, Answer, Score, Scorer, required
from arriero.rewards.sandbox import Limits, Result, probe, run

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE | re.I
)
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.eq, ast.IsNot: operator.ne, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """One test, or a statement between them. source: what the jail does; wanted: what is compared with its value."""

    source: str
    compare: Callable[[Any, Any], bool] | None = None
    wanted: Any = None

    @property
    def task(self) -> dict[str, str]:
        """For the runner."""
        return {"run" if self.compare is None else "eval": self.source}


class UnitTests(Scorer):
    """The scores of code. Raises `NoSandbox` on construction where code cannot be locked up."""

    def __init__(self, field: str = "tests", limits: Limits = Limits(), workers: int = 0) -> None:  # noqa: B008  frozen
        probe()
        self._field, self._limits = field, limits
        self._threads = ThreadPoolExecutor(workers or os.cpu_count() or 1, "unit-tests")

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return list(self._threads.map(self._one, answers))

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """The tests have to be Python, or pairs, and at least one."""
        self._tests(row, where)

    def close(self) -> None:
        """End the threads; jails end with their answers."""
        self._threads.shutdown(cancel_futures=True)

    def _one(self, answer: Answer) -> Score:
        if not answer.finished:
            return CUT
        code = code_of(answer.text)
        if code is None:
            return Score(0.0, note="several versions of the code")
        setup = str(answer.row.get("setup") or "")
        tests = self._tests(answer.row, answer.where)
        if isinstance(tests, list):
            return self._programs(code, tests)
        steps = _steps(setup, tests, str(answer.row.get("entry_point") or ""), self._limits)
        result = run({"code": f"{setup}\n{code}", "steps": [step.task for step in steps]}, self._limits)
        return _judged(result, steps)

    def _programs(self, code: str, pairs: Sequence[Mapping[str, str]]) -> Score:
        steps = [_Step(pair["input"], _same_output, pair["output"]) for pair in pairs]
        task = {"code": code, "program": True, "steps": [{"stdin": step.source} for step in steps]}
        result = run(task, self._limits)
        return _judged(Result(result.end, [{}, *result.replies]), steps)

    def _tests(self, row: Mapping[str, Any], where: str) -> str | list[Any]:
        tests = required(row, self._field, where)
        if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
            tests = "\n".join(tests)
        if isinstance(tests, str):
            try:
                tree = ast.parse(tests)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise DataError(f"{where}: {self._field!r} is no Python ({error}); mend the tests") from error
            if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
                raise DataError(f"{where}: {self._field!r} asserts nothing, so every answer would pass; add an assert")
            return tests
        pairs = isinstance(tests, list) and bool(tests)
        if not (pairs and all(isinstance(t, dict) and _is_text(t, "input") and _is_text(t, "output") for t in tests)):
            raise DataError(
                f"{where}: {self._field!r} is {tests!r:.80}; make it Python with asserts, a list of such texts, or a "
                "list of {input, output}"
            )
        return tests


def code_of(text: str) -> str | None:
    """The Python of an answer: its fenced blocks, or all of it. None where two blocks define the same function."""
    blocks = _FENCE.findall(text)
    if not blocks:
        return text
    seen: set[str] = set()
    for block in blocks:
        try:
            names = {node.name for node in ast.parse(block).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if names & seen:
            return None
        seen |= names
    return "\n".join(blocks)


def _judged(result: Result, steps: Sequence[_Step]) -> Score:
    """The score of what the jail said."""
    if result.end == "timeout":
        return Score(0.0, "timeout")
    begun, *replies = result.replies or [{}]
    if "raised" in begun:
        outcome = "crash" if begun["raised"] == "MemoryError" else "scored"
        return Score(0.0, outcome, f"{begun['raised']}: {begun.get('text', '')}"[:80])  # type: ignore[arg-type]
    for number, (step, reply) in enumerate(zip(steps, replies, strict=False), 1):
        if not _passed(step, reply):
            got = f"{reply['raised']}: {reply.get('text', '')}" if "raised" in reply else "wrong"
            return Score(0.0, note=f"test {number} of {len(steps)}: {step.source[:40]!r}: {got}"[:120])
    if result.end != "done" or len(replies) != len(steps):
        return Score(0.0, "crash", "ended before its tests" if result.end == "done" else result.end)
    return Score(1.0)


def _passed(step: _Step, reply: Mapping[str, Any]) -> bool:
    if step.compare is None:
        return reply == {}
    if "value" not in reply:
        return False
    try:
        return bool(step.compare(_received(reply["value"]), step.wanted))
    except Exception:  # values that cannot be compared, or that nobody sent in good faith
        return False


def _same_output(printed: str, wanted: str) -> bool:
    """Whether two outputs are equal line by line, white space at the ends of lines and of the whole apart."""
    lines = ([line.rstrip() for line in text.strip().split("\n")] for text in (printed, wanted))
    return next(lines) == next(lines)


@lru_cache(maxsize=4096)
def _steps(setup: str, tests: str, entry_point: str, limits: Limits) -> tuple[_Step, ...]:
    """The tests as steps, their right sides computed."""
    steps = [_step(node) for node in _statements(tests, entry_point)]
    unknown = [step for step in steps if isinstance(step.wanted, ast.expr)]
    if not unknown:
        return tuple(steps)
    clean = run(
        {"code": setup, "steps": [s.task if s.compare is None else {"eval": ast.unparse(s.wanted)} for s in steps
                                  if s.compare is None or s in unknown]},
        limits,
    )  # fmt: skip
    replies = iter(clean.replies[1:])
    known = []
    for step in steps:
        reply = next(replies, {}) if step.compare is None or step in unknown else {}
        if step not in unknown:
            known.append(step)
        elif "value" in reply:
            known.append(_Step(step.source, step.compare, _received(reply["value"])))
        else:  # it needs the answer's names
            known.append(_Step(_whole(step)))
    return tuple(known)


def _statements(tests: str, entry_point: str) -> list[ast.stmt]:
    """The statements of the tests; those of HumanEval's check(candidate) stand for its call."""
    body = ast.parse(tests).body
    check = next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == "check" and n.args.args), None)
    if check is None or not entry_point:
        return body
    assign = ast.parse(f"{check.args.args[0].arg} = {entry_point}").body
    called = [n for n in body if n is not check and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call))]
    return [*called, *assign, *check.body]


def _step(node: ast.stmt) -> _Step:
    """A statement as a step; an assert is taken apart where it compares two sides."""
    if not isinstance(node, ast.Assert):
        return _Step(ast.unparse(node))
    test = node.test
    if not (isinstance(test, ast.Compare) and len(test.ops) == 1):
        return _Step(ast.unparse(test), lambda value, _: bool(value))
    left, right, compare = ast.unparse(test.left), test.comparators[0], _COMPARED[type(test.ops[0])]
    try:
        return _Step(left, compare, ast.literal_eval(right))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return _Step(left, compare, right)


def _whole(step: _Step) -> str:
    """The assert again, for a right side that is known only beside the answer."""
    sign = next(kind for kind, function in _COMPARED.items() if function is step.compare)
    compared = ast.Compare(ast.parse(step.source, mode="eval").body, [sign()], [step.wanted])
    return ast.unparse(ast.fix_missing_locations(ast.Assert(compared)))


def _received(sent: Any) -> Any:
    """A value that the runner sent (`runner._sent`). Raises whatever, where it was made up."""
    kind, content = sent
    if kind == "constant":
        return {"None": None, "True": True, "False": False}[content]
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "str":
        return str(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "ratio":
        return Fraction(int(content[0], 16), int(content[1], 16))
    if kind == "dict":
        return {_received(key): _received(value) for key, value in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_received, content))


def _is_text(pair: Mapping[str, Any], name: str) -> bool:
    return isinstance(pair.get(name), str)
