"""Work for other processes, which import it by this module's name."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path


def slowly(x: int) -> int:
    """A square, sooner or later."""
    time.sleep(random.Random(x).random() / 50)
    return x * x


def fail_sooner_the_later(x: int) -> int:
    """All from the third on fail, the last first."""
    time.sleep((7 - x) / 20)
    if x > 1:
        raise ValueError(f"item {x}")
    return x


def unsendable(x: int) -> Callable[[], int]:
    """What no process can send to another."""
    return lambda: x


def die_answering(seen: Path, x: int) -> bytes:
    """A long answer; the process dies some milliseconds after the first one to each odd x, in the midst of sending."""
    if x % 2 and not (seen / str(x)).exists():
        (seen / str(x)).touch()
        threading.Timer(x / 5000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes(2**23 + x)


def die_once(seen: Path, mortal: set[int], x: int) -> int:
    """x; the process dies when it comes to a mortal one for the first time."""
    if x in mortal and not (seen / str(x)).exists():
        (seen / str(x)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x
