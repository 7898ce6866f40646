"""Processes that die when a test wants them to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def killer(age: Callable[[], float]) -> Iterator[list[int]]:
    """Kills every process that multiprocessing starts from here when it is `age()` seconds old; yields their ids."""
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        ages: dict[int, float] = {}
        while not over.wait(0.002):
            for child in psutil.Process().children():
                try:
                    if not any("spawn_main" in word for word in child.cmdline()):
                        continue
                    if (
                        time.time() - child.create_time() > ages.setdefault(child.pid, age())
                        and child.pid not in killed
                    ):
                        child.kill()
                        killed.append(child.pid)
                except psutil.Error:  # it has ended by itself
                    continue

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield killed
    finally:
        over.set()
        hunter.join()
