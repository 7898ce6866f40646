"""A pool of worker processes on this machine that survives the death of workers.

concurrent.futures' pool hangs for ever if a worker is killed while it starts. Here a worker that dies (killed, out of
memory) is replaced and its tasks are repeated; a task at which three workers have died ends in an error.

Processes are spawned, not forked: torch's threads do not survive a fork. They end with their parent, even where that
was killed by SIGKILL.
Price: starting a process takes about a second; arguments and results are pickled once each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, TypeVar

from arriero.errors import DataError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Task = tuple[Any, ...]

DEATHS = 3  # of workers at one task, before giving up
LOST = (EOFError, OSError)  # what reading from a dead process raises; OSError where it died amid an answer


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, doing: str
) -> Iterator[tuple[Item, Result]]:
    """Each item with work(item), in order; at most 3 * workers + 1 are under way, so memory stays bounded.

    workers: processes; with 1 the work is done in this one. doing: a word for the error message, as in "tokenising".
    Raises what `work` raises, at its item, and DataError where processes die again and again.
    """
    if workers == 1:
        yield from ((item, work(item)) for item in items)
        return
    pool = Pool(workers, doing, "give fewer workers; with 1 there is no other process")
    waiting: deque[Item] = deque()
    answers: dict[int, tuple[bool, Any]] = {}

    def tasks() -> Iterator[Task]:
        for item in items:
            waiting.append(item)
            yield (item,)

    try:
        following = 0
        for number, *answer in pool.answers(work, tasks(), queue=2, ahead=3 * workers):
            answers[number] = tuple(answer)
            while following in answers:
                succeeded, result = answers.pop(following)
                if not succeeded:
                    raise result
                yield waiting.popleft(), result
                following += 1
    finally:
        pool.close()


class Pool:
    """Processes that do tasks, each a call of a function.

    doing, remedy: for the error message where processes die again and again.
    """

    def __init__(self, workers: int, doing: str, remedy: str) -> None:
        self._size, self._doing, self._remedy = workers, doing, remedy
        self._workers: list[_Worker] = []

    def run(self, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """Each task's number and result, as they are done; the first exception ends it."""
        for number, succeeded, result in self.answers(function, tasks):
            if not succeeded:
                raise result
            yield number, result

    def answers(
        self, function: Callable[..., Any], tasks: Iterable[Task], queue: int = 1, ahead: int | None = None
    ) -> Iterator[tuple[int, bool, Any]]:
        """Each task's number, whether it succeeded, and its result or exception, as they are done.

        queue: tasks that a worker holds; with 2 it need not wait for a caller that is busy elsewhere.
        ahead: how far the newest task may be from the oldest that is not done.
        """
        left = _Tasks(tasks, ahead)
        deaths: Counter[int] = Counter()
        try:
            while True:
                while self._has_room(queue) and (task := left.next(self._oldest())) is not None:
                    self._least_busy().begin(function, *task)
                busy = {worker.connection: worker for worker in self._workers if worker.tasks}
                if not busy:
                    return
                for ready in connection.wait(list(busy)):
                    worker = busy[ready]  # type: ignore[index]
                    try:
                        succeeded, result = worker.connection.recv()
                    except LOST as error:
                        self._remove(worker)
                        left.put_back(worker.tasks)
                        at, _ = worker.tasks[0]
                        deaths[at] += 1
                        if deaths[at] == DEATHS:
                            raise DataError(self._given_up()) from error
                        continue
                    number, _ = worker.tasks.popleft()
                    yield number, succeeded, result
        finally:
            for worker in [worker for worker in self._workers if worker.tasks]:
                self._remove(worker)

    def close(self) -> None:
        """End the processes at once: what they were writing stays under a temporary name."""
        for worker in list(self._workers):
            self._remove(worker)

    def _oldest(self) -> int | None:
        """The number of the oldest task that a worker holds."""
        return min((number for worker in self._workers for number, _ in worker.tasks), default=None)

    def _has_room(self, queue: int) -> bool:
        return len(self._workers) < self._size or any(len(worker.tasks) < queue for worker in self._workers)

    def _least_busy(self) -> _Worker:
        """The worker with the fewest tasks; a new one rather than one that has any."""
        worker = min(self._workers, key=lambda worker: len(worker.tasks), default=None)
        if worker is None or (worker.tasks and len(self._workers) < self._size):
            worker = _Worker()
            self._workers.append(worker)
        return worker

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()

    def _given_up(self) -> str:
        return (
            f"{DEATHS} {self._doing} processes died one after another at the same work, probably for want of memory: "
            f'{self._remedy} (in a script, the main part has to stand under `if __name__ == "__main__":`)'
        )


class _Tasks:
    """Tasks with their numbers, in order; those of workers that died come first.

    ahead: how far the next task may be from the oldest one under way.
    """

    def __init__(self, tasks: Iterable[Task], ahead: int | None) -> None:
        self._left, self._ahead = enumerate(tasks), ahead
        self._begun = 0
        self._again: list[tuple[int, Task]] = []

    def next(self, oldest: int | None) -> tuple[int, Task] | None:
        """The next task, or None if there is none or it is too far ahead of `oldest`, the oldest under way."""
        if self._again:
            return self._again.pop()
        if self._ahead is not None and oldest is not None and self._begun - oldest > self._ahead:
            return None
        task = next(self._left, None)
        self._begun += task is not None
        return task

    def put_back(self, tasks: Iterable[tuple[int, Task]]) -> None:
        """Do these again, before any other."""
        self._again += reversed(list(tasks))


class _Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.tasks: deque[tuple[int, Task]] = deque()  # the one it does, and those that wait
        self._function: Callable[..., Any] | None = None
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _no_interrupt():
            self._process.start()
        theirs.close()  # so that its end is seen when the process dies

    def begin(self, function: Callable[..., Any], number: int, task: Task) -> None:
        """Send a task; where the worker is dead already, that shows when its result is read."""
        self.tasks.append((number, task))
        new = None if function is self._function else function  # sent once: it may hold a tokenizer
        self._function = function
        with contextlib.suppress(ConnectionError):
            self.connection.send((new, task))

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """What is started in here never hears Ctrl-C, which reaches the whole group; its parent ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else that is started inside, and lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(line: Connection) -> None:
    """What a worker does: tasks, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    received: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(line, received), daemon=True).start()
    function: Callable[..., Any] | None = None
    while True:
        message = received.get()
        try:
            new, task = ForkingPickler.loads(message)
            function = new or function
            assert function is not None
            line.send((True, function(*task)))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            line.send((False, error))


def _receive(line: Connection, received: SimpleQueue[bytes]) -> None:
    """Take what comes, so that the parent never waits to send; its end of the line closes when it dies."""
    while True:
        try:
            received.put(line.recv_bytes())
        except LOST:
            os._exit(1)
