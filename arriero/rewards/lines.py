"""The inner side of a process that judges (isolated.py has the outer one): lines of JSON in, one out for each.

A message is answered with an object; a user's mistake with {"refused": why}; whatever else the code raises is worth 0
with the outcome "crash", and a note of where. What the code prints goes to the standard error stream.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from arriero.errors import UserError

LONGEST = 1 << 16  # bytes of a line, beyond which the outer side gives it up

T = TypeVar("T")


def serve(open_judge: Callable[[], T], answer: Callable[[T, dict[str, Any]], dict[str, Any]]) -> None:
    """Open the judge, say so, then answer line by line until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        line = json.dumps(reply)
        if len(line) >= LONGEST:
            line = json.dumps(_crash(f"it said {len(line):,} characters; at most {LONGEST:,} are read"))
        out.write(line + "\n")

    try:
        judge = open_judge()
    except UserError as error:
        say({"refused": str(error)})
        return
    say({})
    for line in sys.stdin:
        say(_answered(answer, judge, json.loads(line)))


def _answered(answer: Callable[[T, dict[str, Any]], dict[str, Any]], judge: T, message: dict[str, Any]) -> Any:
    try:
        return answer(judge, message)
    except UserError as error:
        return {"refused": str(error)}
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return _crash(f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})")


def _crash(note: str) -> dict[str, Any]:
    return {"value": 0.0, "outcome": "crash", "note": note[:1000]}
