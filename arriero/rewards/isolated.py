"""Scores answers one by one in processes beside this one, each answer within a limit of time.

For what may hang or crash and cannot be stopped inside this process: the user's function, a pattern whose search
explodes, a schema with such patterns, a formula. A process that runs over is killed with all that it began, and the
next answer gets a new one: the answer's outcome is "timeout", or "crash" where the process died or the code raised.
It guards against accidents, not against malice: code that a model wrote belongs in `unit_tests.py`'s sandbox.

Price: half a second to start a process, 0.1 ms an answer. Values of the row that are not JSON's go as their text.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from arriero.errors import ConfigError, UserError
from arriero.rewards.base import CUT, Answer, Score, Scorer
from arriero.rewards.lines import LONGEST
from arriero.show.terminal import warn_once

START = 120.0  # seconds to start a process and import what the function needs


class Isolated(Scorer):
    """The scores of a judge of `worker.py`, by `workers` processes; `seconds` is each answer's limit."""

    def __init__(self, judge: str, *arguments: str, seconds: float, workers: int = 0, takes_cut: bool = False) -> None:
        """takes_cut: whether answers without an end are scored too. Raises `UserError` where the judge cannot start."""
        self._command = [sys.executable, "-m", "arriero.rewards.worker", judge, *arguments]
        self._seconds, self._takes_cut = seconds, takes_cut
        count = workers or min(os.cpu_count() or 1, 4)
        self._free: SimpleQueue[Process] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, "scoring")
        self._all = [Process(self._command) for _ in range(count)]
        for process in self._all:
            self._free.put(process)
        self._all[0].begin()

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return list(self._threads.map(self._one, answers))

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """What the judge says of a row, before there is an answer to it."""
        with _taken(self._free) as process:
            reply = process.ask({"check": dict(row), "where": where}, START)
        if "refused" in reply:
            raise UserError(reply["refused"])
        if "outcome" in reply:  # no answer to this row could be scored
            raise UserError(f"{where}: the reward cannot check this row ({reply['outcome']}: {reply['note']}); mend it")

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.kill()

    def _one(self, answer: Answer) -> Score:
        if not (answer.finished or self._takes_cut):
            return CUT
        message = {
            "prompt": answer.prompt if isinstance(answer.prompt, str) else [dict(m) for m in answer.prompt],
            "text": answer.text, "finished": answer.finished, "row": dict(answer.row), "where": answer.where,
        }  # fmt: skip
        with _taken(self._free) as process:
            reply = process.ask(message, self._seconds)
        if "refused" in reply:
            raise UserError(reply["refused"])
        if reply["outcome"] == "crash":
            warn_once(f"a reward crashed and counts as 0: {reply['note']}")
        return Score(reply["value"], reply["outcome"], reply["note"])


class Process:
    """One process that judges (lines.py), started when it is first needed and after each that was killed."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self.begun = 0  # how often it was started

    def begin(self) -> None:
        """Start it, and wait until it is ready. Raises `UserError` with what it says otherwise."""
        self._child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._unread, self.begun = b"", self.begun + 1
        line = self._line(START)
        if line is None:
            self.kill()
            raise ConfigError(f"the reward's process did not start within {START:g} s or died: see its messages above")
        reply = json.loads(line)
        if "refused" in reply:
            self.kill()
            raise ConfigError(reply["refused"])

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What it answers; a timeout, or a crash where it died."""
        if self._child is None or self._child.poll() is not None:
            self.kill()
            self.begin()
        assert self._child is not None and self._child.stdin is not None
        began = time.monotonic()
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._child.stdin.flush()
        line = self._line(seconds)
        if line is not None:
            return json.loads(line)
        self.kill()
        if time.monotonic() - began >= seconds:
            return {"value": 0.0, "outcome": "timeout", "note": f"over {seconds:g} s"}
        return {"value": 0.0, "outcome": "crash", "note": "its process died"}

    def kill(self) -> None:
        """End it with all that it began."""
        if self._child is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self._child = None

    def _line(self, seconds: float) -> bytes | None:
        """The next line it writes; None where it takes longer, dies, or writes without end."""
        assert self._child is not None and self._child.stdout is not None
        until, pipe = time.monotonic() + seconds, self._child.stdout.fileno()
        waiting = select.poll()  # select.select fails where this process has over 1,024 files open
        waiting.register(pipe, select.POLLIN)
        while b"\n" not in self._unread:
            ready = waiting.poll(max(until - time.monotonic(), 0) * 1000)
            got = os.read(pipe, LONGEST) if ready else b""
            self._unread += got
            if not got or len(self._unread) > LONGEST:
                return None
        line, _, self._unread = self._unread.partition(b"\n")
        return line


class _taken:
    """A free process, given back at the end."""

    def __init__(self, free: SimpleQueue[Process]) -> None:
        self._free = free

    def __enter__(self) -> Process:
        self._process = self._free.get()
        return self._process

    def __exit__(self, *error: object) -> None:
        self._free.put(self._process)
