"""Processes that talk through a store: threads of this one, each with a client of its own."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from arriero.errors import TrainingError
from arriero.peers import Peers


def joined(world: int, timeout: float = 20.0) -> list[Peers]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = TCPStore("127.0.0.1", port, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    return [Peers(rank, world, server.clone() if rank else server, timeout) for rank in range(world)]


def test_all_words_reach_process_0_and_its_word_all_many_times_over() -> None:
    heard: dict[int, list[object]] = {}

    def talk(peers: Peers) -> None:
        heard[peers.rank] = []
        for n in range(7):
            words = peers.gather("numbers", {"n": n * 10 + peers.rank})
            heard[peers.rank].append(peers.announce("sum", sum(w["n"] for w in words) if words else None))

    everyone = joined(3)
    threads = [threading.Thread(target=talk, args=(peers,)) for peers in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {rank: [30 * n + 3 for n in range(7)] for rank in range(3)}
    left = {key for n in range(1, 15) for rank in range(3) for key in (f"{n}/numbers/{rank}", f"{n}/sum/{rank}")}
    assert [key for key in left if everyone[0].store.check([key])] == ["14/sum/0"], "words are not left lying about"


def test_who_does_not_speak_is_named() -> None:
    first, second, _ = joined(3, timeout=0.3)
    second.gather("checkpoint of step 5", 1)
    with pytest.raises(TrainingError, match=r"checkpoint of step 5: no word from process 2 of 3 for 0\.3 seconds"):
        first.gather("checkpoint of step 5", 1)
    with pytest.raises(TrainingError, match=r"verdict: no word from process 0 of 3 for 0\.45 seconds"):
        second.announce("verdict")


def test_alone_one_hears_oneself() -> None:
    assert Peers().gather("x", 17) == [17]
    assert Peers().announce("x", 19) == 19
    assert Peers().for_thread("save").world == 1
