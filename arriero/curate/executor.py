"""Who does the work: this process, a pool of processes, or a Ray cluster. Tasks are independent; the order is
anybody's.

A worker that dies (killed, out of memory) is replaced and its task done again; a task whose worker dies three times is
given up with an error. A worker whose parent dies ends itself at once, so that a killed run leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Protocol

from arriero.errors import DataError, UserError, require

DEATHS = 3  # of workers at one task, before giving up
TOO_MANY_DEATHS = (
    f"{DEATHS} processes died one after another at the same work, probably for want of memory: give fewer --workers or "
    'a smaller part_mb; from a script, curate under `if __name__ == "__main__":`; run again to go on from here'
)


class Executor(Protocol):
    """Runs a function on many arguments."""

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Each task's number and result, as they are done; the first exception ends it."""
        ...


@contextmanager
def open_executor(workers: int, ray: str) -> Iterator[Executor]:
    """What the settings ask for; stopped when the block ends."""
    workers = workers or os.cpu_count() or 1
    if ray:
        cluster = RayCluster(ray, workers)
        try:
            yield cluster
        finally:
            cluster.close()
    elif workers == 1:
        yield Here()
    else:
        pool = Pool(workers)
        try:
            yield pool
        finally:
            pool.close()


class Here:
    """One after another, in this process."""

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """In order."""
        for number, task in enumerate(tasks):
            yield number, function(*task)


class Pool:
    """Processes that each do one task at a time.

    Our own, since concurrent.futures' pool hangs for good where a worker is killed while it starts.
    """

    def __init__(self, workers: int) -> None:
        self._size = workers
        self._idle: list[_Worker] = []

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """As they are done; a task whose worker dies goes to another."""
        waiting = list(range(len(tasks)))[::-1]
        deaths = [0] * len(tasks)
        busy: dict[Connection, tuple[_Worker, int]] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self._size:
                    worker = self._idle.pop() if self._idle else _Worker()
                    worker.begin(function, tasks[waiting[-1]])
                    busy[worker.connection] = worker, waiting.pop()
                for ready in connection.wait(list(busy)):
                    worker, number = busy.pop(ready)  # type: ignore[call-overload]
                    try:
                        succeeded, result = worker.connection.recv()
                    except (EOFError, ConnectionError) as error:
                        worker.close()
                        waiting.append(number)
                        deaths[number] += 1
                        if deaths[number] == DEATHS:
                            raise DataError(TOO_MANY_DEATHS) from error
                        continue
                    self._idle.append(worker)
                    if not succeeded:
                        raise result
                    yield number, result
        finally:
            for worker, _ in busy.values():
                worker.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._idle:
            worker.close()
        self._idle.clear()


class _Worker:
    """One process and the line to it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen when the process dies

    def begin(self, function: Callable[..., Any], task: tuple[Any, ...]) -> None:
        """Send a task; where the worker is dead already, that shows when its result is read."""
        with contextlib.suppress(ConnectionError):
            self.connection.send((function, task))

    def close(self) -> None:
        """End the process at once: what it was writing stays under a temporary name."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(line: Connection) -> None:
    """What a worker does: tasks, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        function, task = line.recv()
        try:
            answer = True, function(*task)
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            answer = False, error
        line.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def one_thread() -> None:
    """The processes are the parallelism."""
    import pyarrow

    os.environ["OMP_NUM_THREADS"] = "1"
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)


class RayCluster:
    """Tasks on a Ray cluster, or on a local one that is started for this run ("local")."""

    def __init__(self, address: str, workers: int) -> None:
        self.ray = require("ray", "ray")
        try:
            if address == "local":
                self.ray.init(
                    num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False,
                    _metrics_export_port=None,
                )  # fmt: skip
            else:
                self.ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`, or give --ray local"
            ) from error
        self.capacity = max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """As they are done; Ray itself repeats tasks whose worker died."""
        remote = self.ray.remote(num_cpus=1, max_retries=DEATHS)(function)
        left = iter(enumerate(tasks))
        under_way: dict[Any, int] = {}
        while True:
            while len(under_way) < 2 * self.capacity and (task := next(left, None)) is not None:
                under_way[remote.remote(*task[1])] = task[0]
            if not under_way:
                return
            [reference], _ = self.ray.wait(list(under_way), num_returns=1)
            try:
                result = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            yield under_way.pop(reference), result

    def close(self) -> None:
        """Leave the cluster; one that was started for this run ends."""
        self.ray.shutdown()
