"""Executes tasks: in this process, in a pool of processes, or on a Ray cluster. Tasks are independent, in any order.

A worker that dies is replaced and its task repeated, at most three times (system/pool.py; Ray does likewise).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from arriero.system.cluster import connected
from arriero.system.pool import DEATHS, Pool


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
        pool = Pool(workers, "curating", "give fewer workers or a smaller part_mb; run again to go on from here")
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


def one_thread() -> None:
    """The processes are the parallelism."""
    import pyarrow

    os.environ["OMP_NUM_THREADS"] = "1"
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)


class RayCluster:
    """Tasks on a Ray cluster, or on a local one that is started for this run ("local")."""

    def __init__(self, address: str, workers: int) -> None:
        self.ray = connected(address, workers)
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
