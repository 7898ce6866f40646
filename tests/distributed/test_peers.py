"""Processes that talk through a store: threads of this one, each with a client of its own."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from arriero.distributed.peers import Peers, unused_part
from arriero.errors import TrainingError


def joined(world: int, timeout: float = 20.0) -> list[Peers]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = TCPStore("127.0.0.1", port, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    return [Peers(rank, world, server.clone() if rank else server, timeout) for rank in range(world)]


def test_all_messages_reach_process_0_and_its_message_all_processes_many_times_over() -> None:
    received: dict[int, list[object]] = {}

    def exchange(peers: Peers) -> None:
        received[peers.rank] = []
        for n in range(7):
            sent = peers.gather("numbers", {"n": n * 10 + peers.rank})
            received[peers.rank].append(peers.broadcast("sum", sum(one["n"] for one in sent) if sent else None))

    everyone = joined(3)
    threads = [threading.Thread(target=exchange, args=(peers,)) for peers in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == {rank: [30 * n + 3 for n in range(7)] for rank in range(3)}
    left = {key for n in range(1, 15) for rank in range(3) for key in (f"{n}/numbers/{rank}", f"{n}/sum/{rank}")}
    assert [key for key in left if everyone[0].store.check([key])] == ["14/sum/0"], "messages are deleted once received"


def test_a_process_that_sends_nothing_is_named() -> None:
    first, second, _ = joined(3, timeout=0.3)
    second.gather("checkpoint of step 5", 1)
    with pytest.raises(TrainingError, match=r"checkpoint of step 5: no message from process 2 of 3 for 0\.3 seconds"):
        first.gather("checkpoint of step 5", 1)
    with pytest.raises(TrainingError, match=r"verdict: no message from process 0 of 3 for 0\.45 seconds"):
        second.broadcast("verdict")


def test_a_single_process_receives_its_own_messages() -> None:
    assert Peers().gather("x", 17) == [17]
    assert Peers().broadcast("x", 19) == 19
    assert Peers().for_thread("save").world == 1


def test_what_the_dead_have_left_in_the_store_is_never_taken_for_the_living() -> None:
    (first, second, third), parts = joined(3), {}

    def start(peers: Peers) -> None:
        parts[peers.rank] = unused_part(peers.store, peers.rank, 3, 20)
        parts[peers.rank].set(f"address/{peers.rank}", "new")

    for attempt in range(3):  # process 2 is late each time, and its hello of the attempt before still stands
        threads = [threading.Thread(target=start, args=(peers,)) for peers in (first, second)]
        for thread in threads:
            thread.start()
        threads[0].join(0.1)
        assert not [rank for rank in parts if parts[rank] is not None], attempt
        start(third)
        for thread in threads:
            thread.join()
        assert all(parts[0].check([f"address/{rank}"]) for rank in range(3))
        parts.clear()


def test_who_does_not_come_is_named() -> None:
    first, second, _ = joined(3)
    second.store.set("hello/1", "old")
    with pytest.raises(TrainingError, match=r"process 0 waited 0\.2 seconds \(parallel.timeout\) for process 2 of 3"):
        unused_part(first.store, 0, 3, 0.2)
    with pytest.raises(TrainingError, match=r"process 1 waited 0\.2 seconds .* for all of them of 3 at"):
        unused_part(second.store, 1, 3, 0.2)
