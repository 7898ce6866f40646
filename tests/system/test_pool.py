"""Work spread over processes: results in order, errors where they belong, through any death."""

from __future__ import annotations

import functools
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import killer
from helpers.work import die_answering, die_once, fail_sooner_the_later, slowly, unsendable

from arriero.errors import DataError
from arriero.system.pool import in_order


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_work(workers):
    assert list(in_order(slowly, iter(range(29)), workers, "squaring")) == [(x, x * x) for x in range(29)]


def test_what_a_worker_raises_is_raised_at_its_item():
    done = []
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        for item, _ in in_order(math.sqrt, iter([1.0, 4.0, -1.0, 9.0]), 2, "rooting"):
            done.append(item)
    assert done == [1.0, 4.0]


def test_the_first_of_two_failures_is_told_whichever_worker_comes_to_it_first() -> None:
    with pytest.raises(ValueError, match="item 2"):
        list(in_order(fail_sooner_the_later, iter(range(7)), 3, "failing"))


def test_no_more_is_read_than_may_be_under_way() -> None:
    read = []
    results = in_order(slowly, (read.append(x) or x for x in range(101)), 2, "squaring")
    for done, _ in enumerate(results):
        assert len(read) <= done + 3 * 2 + 1
    assert len(read) == 101


def test_what_cannot_be_sent_back_is_told_and_kills_nobody() -> None:
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError), match="pickle"):
        list(in_order(unsendable, iter([3, 5]), 2, "sending"))


def test_a_worker_that_dies_again_and_again_is_told_with_the_remedy() -> None:
    said = (
        "3 dying processes died one after another at the same work, probably for want of memory: give fewer workers; "
        'with 1 there is no other process (in a script, the main part has to stand under `if __name__ == "__main__":`)'
    )
    with pytest.raises(DataError, match=f"^{re.escape(said)}$"):
        list(in_order(os._exit, iter([3, 5]), 2, "dying"))


def test_work_whose_worker_dies_is_done_again_with_what_waited_behind_it(tmp_path: Path) -> None:
    work = functools.partial(die_once, tmp_path, {3, 4, 11})
    assert list(in_order(work, iter(range(23)), 2, "dying")) == [(x, x) for x in range(23)]
    assert len(list(tmp_path.iterdir())) == 3


def test_workers_killed_at_any_moment_of_their_start_are_replaced_or_told_of() -> None:
    """The moments include those in which concurrent.futures' pool would hang for good."""
    rng = random.Random(5)
    with killer(lambda: rng.uniform(0, 0.1)) as killed, pytest.raises(DataError, match="3 squaring processes died"):
        list(in_order(slowly, iter(range(7)), 2, "squaring"))
    assert len(killed) >= 3


def test_workers_killed_while_they_answer_are_replaced(tmp_path: Path) -> None:
    results = in_order(functools.partial(die_answering, tmp_path), iter(range(9)), 2, "answering")
    assert [len(result) for _, result in results] == [2**23 + x for x in range(9)]
    assert len(list(tmp_path.iterdir())) == 4


def test_workers_that_start_hear_no_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from arriero.system.pool import in_order\n"
        "if __name__ == '__mp_main__':\n"  # the worker, which imports the script
        "    os.write(1, b'starting\\n')\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        list(in_order(time.sleep, iter([60, 60]), 2, 'sleeping'))\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(2)]
        os.killpg(process.pid, signal.SIGINT)
        assert [*said, process.communicate(timeout=60)[0]] == ["starting\n", "starting\n", "interrupted\n"]
