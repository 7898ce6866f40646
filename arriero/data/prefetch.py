"""Prefetching: the batches of the next steps are made in background threads, so that a step need not wait for data.

`Prefetched(make)` is called like `make`, with the number of a step. Threads suffice: reading memory-mapped pages and
copying them releases the interpreter lock, and so does what a step computes. The threads change neither order nor
content, since `make` is a pure function of the step; a step out of order is made when it is requested.
Price: `ahead` batches of memory. bench/loader.py measures how long a step still waits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetched(Generic[Made]):
    """`make`, ahead of its caller. last: the number of steps, behind which nothing is made."""

    def __init__(self, make: Callable[[int], Made], last: int, workers: int = 1, ahead: int = 2) -> None:
        """workers: threads, 0 to make everything when it is asked for. ahead: steps."""
        self._make, self._last, self._ahead = make, last, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batches") if workers else None
        self._waiting: dict[int, Future[Made]] = {}

    def __call__(self, step: int) -> Made:
        """What `make(step)` returns, or raises."""
        if self._pool is None:
            return self._make(step)
        wanted = range(step, min(step + self._ahead + 1, self._last))
        for other in self._waiting.keys() - set(wanted):
            self._waiting.pop(other).cancel()
        for number in wanted:
            if number not in self._waiting:
                self._waiting[number] = self._pool.submit(self._make, number)
        return self._waiting.pop(step).result() if step in self._waiting else self._make(step)

    def close(self) -> None:
        """Stop making batches."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
