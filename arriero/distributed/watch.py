"""Heartbeats: names a process that has stopped responding and ends the run, so that torchrun can restart it.

A process that hangs, or whose machine is gone, leaves the others waiting in a collective, whose error names nobody. So
each process increments a counter in the store from a background thread; process 0 watches all counters, the others
watch process 0's. When one has not changed for the timeout, the watching process names it on standard error and exits,
since Python cannot interrupt a collective.
A process that is stopped as a whole is detected (SIGSTOP, a frozen machine, a lost network). One whose threads run on
while its training waits for something is not: the timeout of the collectives ends that.
Price: an access to the store every tenth of the timeout or five seconds; on process 0 one for each process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from arriero.distributed.peers import Peers

LEFT = "left"  # a counter's last value: the process has finished


class Watch:
    """Watches the processes of a run while it is entered; with one process, nothing."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers.for_thread("watch")
        self.interval = min(5.0, peers.timeout / 10)  # seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self._peers.world > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(self.interval)

    def _look(self) -> None:
        rank, store = self._peers.rank, self._peers.store
        others = [r for r in range(self._peers.world) if r != rank] if rank == 0 else [0]
        moved = dict.fromkeys(others, (b"", time.monotonic()))
        limit = self._peers.timeout - 2 * self.interval  # so that the exit comes within the time-out
        count = 0
        try:
            while not self._over.wait(self.interval):
                store.set(f"beat/{rank}", str(count := count + 1))
                for other in others:
                    beat = store.get(f"beat/{other}") if store.check([f"beat/{other}"]) else b""
                    if beat != moved[other][0] or beat == LEFT.encode():
                        moved[other] = beat, time.monotonic()
                now = time.monotonic()
                if silent := {other: now - since for other, (_, since) in moved.items() if now - since > limit}:
                    self._end(silent)
            store.set(f"beat/{rank}", LEFT)
        except Exception:  # the store is gone, and with it the run: the collectives will fail
            return

    def _end(self, silent: dict[int, float]) -> None:
        names = ", ".join(str(rank) for rank in silent)
        seconds = max(silent.values())
        print(
            f"process {names} of {self._peers.world} has not been heard of for {seconds:.0f} seconds (parallel.timeout "
            f"{self._peers.timeout:g}); it hangs, or its machine is gone. Process {self._peers.rank} ends; torchrun "
            "--max-restarts starts all again from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        _exit(1)


def _exit(code: int) -> Any:
    os._exit(code)  # the main thread waits in a collective that nothing will end
