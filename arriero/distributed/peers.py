"""Words between the processes of a run: JSON through the store that torchrun keeps for them, beside the tensors' ways.

For what is small and seldom (who has written what, who is still there), from any thread: nothing said here can get out
of step with the collectives of a training step, no pickle is sent, and a process that does not answer is named.
Price: a message to the store, about 0.1 ms, for each word said and each word heard.
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
PAUSE = 0.005, 0.2  # seconds between looks at the store, at first and at most


class Peers:
    """All processes of a run as process `rank` of `world` sees them; alone unless a `store` joins it to others.

    Every process says the same things in the same order; one object serves one thread.
    timeout: seconds that a word is waited for.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None, timeout: float = 600.0) -> None:
        assert (world > 1) == (store is not None), "several processes need a store to talk through"
        self.rank, self.world, self.store, self.timeout = rank, world, store, timeout
        self._said = 0
        self._stale: list[str] = []

    def for_thread(self, name: str) -> Peers:
        """The same processes, for another thread; `name` keeps its words apart from others'."""
        if self.store is None:
            return self
        from torch.distributed import PrefixStore

        return Peers(self.rank, self.world, PrefixStore(name, self.store.clone()), self.timeout)

    def gather(self, topic: str, word: Any) -> list[Any] | None:
        """What all processes say on `topic`, in order of rank, on process 0; None on the others.

        Raises `TrainingError` naming those who have not spoken when the time is up.
        """
        if self.world == 1:
            return [word]
        key = self._key(topic)
        if self.rank:
            self.store.set(f"{key}/{self.rank}", json.dumps(word))
            return None
        keys = [f"{key}/{rank}" for rank in range(1, self.world)]
        self._await(topic, keys, self.timeout)
        words = [word, *(json.loads(self.store.get(k)) for k in keys)]
        for k in (*keys, *self._stale):  # who speaks now has heard all that was announced before
            self.store.delete_key(k)
        self._stale = []
        return words

    def announce(self, topic: str, word: Any = None) -> Any:
        """What process 0 says, on every process. Waits half as long again: process 0 may be waiting for a third."""
        if self.world == 1:
            return word
        key = self._key(topic)
        if self.rank == 0:
            self.store.set(f"{key}/0", json.dumps(word))
            self._stale.append(f"{key}/0")
            return word
        self._await(topic, [f"{key}/0"], 1.5 * self.timeout)
        return json.loads(self.store.get(f"{key}/0"))

    def _key(self, topic: str) -> str:
        self._said += 1
        return f"{self._said}/{topic}"

    def _await(self, topic: str, keys: list[str], timeout: float) -> None:
        """Look until all keys are there. Not the store's own wait: a process that has to end would hang in it."""
        deadline, pause = time.monotonic() + timeout, PAUSE[0]
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                missing = [key.rsplit("/", 1)[1] for key in keys if not self.store.check([key])]
                raise TrainingError(
                    f"{topic}: no word from process {', '.join(missing)} of {self.world} for {timeout:g} seconds "
                    "(parallel.timeout); it hangs, or its machine is gone: see its own log"
                )
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])


def join(backend: str, timeout: float) -> None:
    """Join the processes that torchrun started in torch.distributed's default group. timeout: seconds, of collectives.

    torchrun keeps one store through all restarts, and addresses that killed processes left there break the next start
    (torch 2.13). So the processes first agree on a part of the store that none has written to before.
    """
    import torch.distributed as dist

    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store = unused_part(store, rank, world, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))


def unused_part(store: Any, rank: int, world: int, timeout: float) -> Any:
    """A part of `store` for those who are there now, whatever others of the same ranks have left in it.

    Each says hello with a new token; process 0 proposes all tokens that it sees, and each agrees to a proposal that has
    its own. Only when all have agreed, none of the tokens can be one of the dead, and process 0 says go.
    """
    from torch.distributed import PrefixStore

    token, deadline = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"hello/{rank}", token)
    while True:
        hellos = [f"hello/{r}" for r in range(world)]
        missing = [r for r, key in enumerate(hellos) if rank == 0 and not store.check([key])]
        if rank == 0 and not missing:
            store.set("proposal", json.dumps([store.get(key).decode() for key in hellos]))
        proposal = json.loads(store.get("proposal")) if not missing and store.check(["proposal"]) else []
        name = hashlib.sha256("".join(proposal).encode()).hexdigest()[:16]
        if len(proposal) == world and proposal[rank] == token:
            store.set(f"{name}/agreed/{rank}", "")
            if rank == 0:
                missing = [r for r in range(world) if not store.check([f"{name}/agreed/{r}"])]
                if not missing:
                    store.set(f"{name}/go", "")
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


def peers_of_this_run(timeout: float = 600.0) -> Peers:
    """The processes that torch.distributed has joined, or this one alone; they all have to ask equally often.

    Each answer has words of its own: two trainers in one process do not hear what the other's said.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Peers()
    assert dist.group.WORLD is not None
    store: Any = dist.group.WORLD.get_group_store()
    store = dist.PrefixStore(f"peers/{next(_asked)}", store.clone())
    return Peers(dist.get_rank(), dist.get_world_size(), store, timeout)
