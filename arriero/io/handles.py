"""Memory-mapped arrays and files for appending, by the thousand, of which only a few are open at a time.

A process may have a limited number of open files (`ulimit -n`; often 1,024, on a Mac 256), a memory map keeps one open,
and a corpus of a thousand sources has three files for each. So at most `AT_ONCE`, the most recently used, are open
here; the others are reopened on demand. The command line raises the limit as far as the system allows first.
Price: 0.1 microseconds where the file is open, about 20 where it has to be reopened.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import DataError
from arriero.io.limits import open_files

AT_ONCE = max(8, min(2**14, open_files() // 4))
"""Files that are open here at once, of either kind: a quarter of what the process may have when it starts."""


class MappedArray:
    """The numbers in a file, one axis, read in place. `array()` is fast enough to be called at every use."""

    def __init__(self, path: Path, dtype: str, n: int) -> None:
        self.path, self.dtype, self.n = path, np.dtype(dtype), n
        self._state = _state(os.stat(path))
        self.array()  # what is not whole is refused now

    def array(self) -> NDArray[Any]:
        """All of them; raises DataError where the file does not hold so many, or is another than it was."""
        return _mapped(self)

    def _map(self) -> NDArray[Any]:
        if self.n == 0:
            return np.zeros(0, dtype=self.dtype)
        with open(self.path, "rb") as file:
            if _state(os.fstat(file.fileno())) != self._state:
                raise DataError(f"{self.path}: the file was replaced while it was being read; run it again")
            try:
                return np.memmap(file, dtype=self.dtype, mode="r", shape=(self.n,)).view(np.ndarray)
            except (ValueError, OverflowError) as error:  # shorter than that
                raise DataError(f"{self.path}: it does not hold {self.n:,} numbers ({error})") from error
            except OSError as error:  # which does not say of which file
                raise OSError(error.errno, error.strerror, str(self.path)) from error


_mapped = lru_cache(maxsize=AT_ONCE)(MappedArray._map)


def _state(status: os.stat_result) -> tuple[int, ...]:
    """The identity of a file and of its state."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Appending:
    """Files that are written by turns: those written last stay open, the others are appended to when it is their
    turn."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._open: OrderedDict[Path, IO[bytes]] = OrderedDict()

    def write(self, path: Path, data: bytes) -> None:
        """Append to the file at `path`, which is made where there is none."""
        file = self._open.pop(path, None)
        if file is None:
            while len(self._open) >= self._at_once:
                self._open.popitem(last=False)[1].close()
            file = open(path, "ab")  # noqa: SIM115 -- kept open, which is the point
        self._open[path] = file
        file.write(data)

    def close(self, path: Path) -> None:
        """Have all of it written."""
        if (file := self._open.pop(path, None)) is not None:
            file.close()
