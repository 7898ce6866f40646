"""One job after another: at once, or in a thread of its own while its caller does something else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Turns:
    """Runs jobs in the order in which they come, and no two at a time."""

    def __init__(self, apart: bool) -> None:
        """apart: in a thread; else `run` returns when the job is done, and raises what it raises."""
        self._thread = ThreadPoolExecutor(1, "rollouts") if apart else None

    def run(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """What the job will return."""
        if self._thread is not None:
            return self._thread.submit(job, *arguments)
        done: Future[Any] = Future()
        done.set_result(job(*arguments))
        return done
