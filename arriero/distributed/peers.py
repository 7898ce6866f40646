"""Messages between the processes of a run: small JSON values, sent through the key-value store that torchrun keeps.

For what is small and seldom, such as which files each process wrote. Any thread may use it: messages go through the
store and not through collectives, so they cannot get out of order with those of a training step. No pickle is sent,
and a process that does not answer is named in the error.
Price: about 0.1 ms for each message sent and each message received.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import time
from datetime import timedelta
from typing import Any

from arriero.errors import TrainingError

_asked = itertools.count()
PAUSE = 0.005, 0.2  # seconds between polls of the store, at first and at most


class Peers:
    """All processes of a run as process `rank` of `world` sees them; a single process needs no `store`.

    Every process has to make the same calls in the same order; an object is used by one thread only.
    timeout: seconds to wait for a message.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None, timeout: float = 600.0) -> None:
        assert (world > 1) == (store is not None), "several processes need a store to send messages through"
        self.rank, self.world, self.store, self.timeout = rank, world, store, timeout
        self._n_calls = 0
        self._stale: list[str] = []

    def for_thread(self, name: str) -> Peers:
        """The same processes, for another thread; `name` keeps its messages apart from those of other threads."""
        if self.store is None:
            return self
        from torch.distributed import PrefixStore

        return Peers(self.rank, self.world, PrefixStore(name, self.store.clone()), self.timeout)

    def gather(self, topic: str, message: Any) -> list[Any] | None:
        """The messages of all processes, in order of rank, on process 0; None on the others.

        topic: what it is about, for errors. Raises `TrainingError` naming the processes that sent none in time.
        """
        if self.world == 1:
            return [message]
        key = self._key(topic)
        if self.rank:
            self.store.set(f"{key}/{self.rank}", json.dumps(message))
            return None
        keys = [f"{key}/{rank}" for rank in range(1, self.world)]
        self._await(topic, keys, self.timeout)
        messages = [message, *(json.loads(self.store.get(k)) for k in keys)]
        for k in (*keys, *self._stale):  # who has sent a message now has received all broadcasts before it
            self.store.delete_key(k)
        self._stale = []
        return messages

    def broadcast(self, topic: str, message: Any = None) -> Any:
        """Process 0's message, on every process; the other processes' arguments are ignored.

        Waits 1.5 times the timeout, since process 0 itself may be waiting for a third process.
        """
        if self.world == 1:
            return message
        key = self._key(topic)
        if self.rank == 0:
            self.store.set(f"{key}/0", json.dumps(message))
            self._stale.append(f"{key}/0")
            return message
        self._await(topic, [f"{key}/0"], 1.5 * self.timeout)
        return json.loads(self.store.get(f"{key}/0"))

    def _key(self, topic: str) -> str:
        self._n_calls += 1
        return f"{self._n_calls}/{topic}"

    def _await(self, topic: str, keys: list[str], timeout: float) -> None:
        """Poll until all keys are there. Not the store's own wait, in which a process that has to end would hang."""
        deadline, pause = time.monotonic() + timeout, PAUSE[0]
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                missing = [key.rsplit("/", 1)[1] for key in keys if not self.store.check([key])]
                raise TrainingError(
                    f"{topic}: no message from process {', '.join(missing)} of {self.world} for {timeout:g} seconds "
                    "(parallel.timeout); it hangs, or its machine is gone: see its own log"
                )
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])


def join(backend: str, timeout: float) -> None:
    """Join the processes that torchrun started in torch.distributed's default group. timeout: seconds, of collectives.

    torchrun keeps one store through all restarts, and addresses that killed processes left in it break the next start
    (torch 2.13). So the processes first agree on a prefix that none has written to before.
    """
    import torch.distributed as dist

    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store = unused_part(store, rank, world, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))


def unused_part(store: Any, rank: int, world: int, timeout: float) -> Any:
    """A prefix of `store` for the processes that are alive now, in which no earlier process has written anything.

    Each process writes a new random token; process 0 proposes the list of all tokens that it sees; each process agrees
    to a proposal that holds its own token. When all have agreed, no token can be a dead process's, and process 0
    confirms the proposal, whose hash is the prefix.
    """
    from torch.distributed import PrefixStore

    token, deadline = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"hello/{rank}", token)
    while True:
        missing = _propose(store, world) if rank == 0 else []
        name = _agree(store, rank, world, token) if not missing else None
        if name is not None:
            if rank == 0:
                missing = _confirm(store, name, world)
            if store.check([f"{name}/go"]):
                return PrefixStore(name, store)
        if time.monotonic() > deadline:
            who = f"process {', '.join(map(str, missing))}" if missing else "all of them"
            raise TrainingError(
                f"process {rank} waited {timeout:g} seconds (parallel.timeout) for {who} of {world} at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}; see whether all were started, and "
                "can reach that address"
            )
        time.sleep(0.02)


def _propose(store: Any, world: int) -> list[int]:
    """Process 0: propose the tokens of all processes; returns the ranks that have written none, if any."""
    hellos = [f"hello/{rank}" for rank in range(world)]
    missing = [rank for rank, key in enumerate(hellos) if not store.check([key])]
    if not missing:
        store.set("proposal", json.dumps([store.get(key).decode() for key in hellos]))
    return missing


def _agree(store: Any, rank: int, world: int, token: str) -> str | None:
    """Agree to the proposal and return its name, if there is one that holds this process's token."""
    proposal = json.loads(store.get("proposal")) if store.check(["proposal"]) else []
    if len(proposal) != world or proposal[rank] != token:
        return None
    name = hashlib.sha256("".join(proposal).encode()).hexdigest()[:16]
    store.set(f"{name}/agreed/{rank}", "")
    return name


def _confirm(store: Any, name: str, world: int) -> list[int]:
    """Process 0: confirm the proposal once all have agreed; returns the ranks that have not."""
    missing = [rank for rank in range(world) if not store.check([f"{name}/agreed/{rank}"])]
    if not missing:
        store.set(f"{name}/go", "")
    return missing


def peers_of_this_run(timeout: float = 600.0) -> Peers:
    """The processes of torch.distributed's default group, or this one alone; all have to call this equally often.

    Each call returns a channel of its own: two trainers in one process do not receive each other's messages.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Peers()
    assert dist.group.WORLD is not None
    store: Any = dist.group.WORLD.get_group_store()
    store = dist.PrefixStore(f"peers/{next(_asked)}", store.clone())
    return Peers(dist.get_rank(), dist.get_world_size(), store, timeout)
