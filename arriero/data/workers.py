"""Work spread over processes, its results in the order of the work.

Processes are spawned, not forked: torch's threads do not survive a fork. They end with the process that started them,
even where that was killed by a signal that it could not act on.
Price: starting one takes about a second; an item and its result are pickled once each.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from arriero.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None  # sent once to each process: it may hold a tokenizer


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, doing: str
) -> Iterator[tuple[Item, Result]]:
    """Each item with work(item), in order; at most 3 * workers + 1 are under way, so memory stays bounded.

    workers: processes; with 1 the work is done in this one. doing: a word for the error message, as in "tokenising".
    Raises what `work` raises, at its item, and DataError where a process dies.
    """
    if workers == 1:
        yield from ((item, work(item)) for item in items)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (work,))
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_do, item)))
            if len(waiting) > 3 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} {doing} processes died: out of memory, or started from a script whose main part is "
            'not under `if __name__ == "__main__":`; put it there, or set workers to 1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = work


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
