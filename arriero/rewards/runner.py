"""What runs in the jail: the code under test, and the expressions of its tests. Its source is handed to `python -c`.

Reads a task in JSON: "code", further "paths" of packages, and "steps". It runs the code, then evaluates each step
("eval": an expression, whose value is sent; "run": statements), and sends a line for each: {"value": ...},
{"raised": ...}, {"opaque": its type} or {}. A "program" is run as a script on the "stdin" of each step, and what it
prints is sent. Which value is expected is not known here: code that cheats cannot look it up, and
ending early passes nothing.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

LONG = 1 << 16  # characters of a value
DEEP = 40  # nestings of a value


def main() -> None:
    """Do the task."""
    task = json.loads(sys.stdin.buffer.read())
    sys.path += task["paths"]
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    out = os.fdopen(3, "wb", buffering=0)
    dumps = json.dumps
    sys.setrecursionlimit(5000)

    def say(reply: dict[str, Any]) -> None:
        out.write(dumps(reply).encode() + b"\n")

    if task.get("program"):
        for step in task["steps"]:
            say(_printed(task["code"], step["stdin"]))
        return
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    say(_done(task["code"], names))
    for step in task["steps"]:
        say(_done(step["run"], names) if "run" in step else _value(step["eval"], names))


def _done(source: str, names: dict[str, Any]) -> dict[str, Any]:
    try:
        exec(compile(source, "<answer>", "exec"), names)  # what this process is for
    except Exception as error:
        return _raised(error)
    return {}


def _value(source: str, names: dict[str, Any]) -> dict[str, Any]:
    try:
        value = eval(compile(source, "<test>", "eval"), names)  # what this process is for
        sent = _sent(value, DEEP)
        if len(json.dumps(sent)) > LONG:
            return {"opaque": "too long a value"}
    except TypeError as error:
        return {"opaque": str(error)[9:]} if str(error).startswith("(opaque) ") else _raised(error)
    except Exception as error:
        return _raised(error)
    return {"value": sent}


def _raised(error: BaseException) -> dict[str, Any]:
    return {"raised": type(error).__name__, "text": str(error)[:200]}


def _sent(value: Any, depth: int) -> Any:
    """A value as [kind, content] in JSON; subclasses count as what they are based on, numpy's numbers as Python's."""
    if depth == 0:
        raise TypeError("(opaque) too deep a value")
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if value is None or isinstance(value, bool):
        return ["constant", repr(value)]
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real.hex(), value.imag.hex()]]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", [[_sent(k, depth - 1), _sent(v, depth - 1)] for k, v in dict.items(value)]]
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            return [kind.__name__, [_sent(item, depth - 1) for item in kind.__iter__(value)]]
    if type(value).__name__ in ("Fraction", "Decimal") and type(value).__module__ in ("fractions", "decimal"):
        above, below = value.as_integer_ratio()
        return ["ratio", [hex(above), hex(below)]]
    raise TypeError(f"(opaque) {type(value).__name__}")


def _printed(code: str, given: str) -> dict[str, Any]:
    """What a program prints that reads `given`; it runs in a process of its own, so that it may exit."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(3)
        os.dup2(writer, 1)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
        sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()), encoding="utf-8")
        status = 1
        try:
            exec(compile(code, "<answer>", "exec"), {"__name__": "__main__"})  # what this process is for
            status = 0
        except SystemExit as error:
            status = 0 if error.code in (0, None) else 1
        except BaseException:
            status = 1
        os._exit(status)
    os.close(writer)
    said = b""
    while len(said) <= LONG and (more := os.read(reader, LONG)):
        said += more
    os.close(reader)
    if len(said) > LONG:
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    if len(said) > LONG:
        return {"opaque": "too long an output"}
    return (
        {"value": ["str", said.decode("utf-8", "replace")]} if status == 0 else {"raised": "exit", "text": str(status)}
    )


if __name__ == "__main__":
    main()
