"""Memory that is read from end to end again and again, in pages of 2 MB where the system has them.

With pages of 4 kB the processor looks up where each of them lies, and its prefetcher stops at each border: decoding one
answer in bf16 took 7% longer (docs/log.md). Linux gives huge pages to those who ask for them.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

CHUNK = 32 << 20  # bytes that are asked for at a time
ALIGNED = 64


class HugePages:
    """A place for tensors, which is given back chunk by chunk as the last tensor in a chunk is dropped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor there; the tensor itself where the system has no such pages."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return tensor
        size = tensor.nbytes
        with self._lock:
            if self._used + size > len(self._chunk):
                self._chunk, self._used = _chunk(max(size, CHUNK)), 0
            room = self._chunk[self._used : self._used + size]
            self._used += -(-size // ALIGNED) * ALIGNED
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _chunk(size: int) -> Tensor:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them: these are pages like all others
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
