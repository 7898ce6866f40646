"""The memory that a step frees serves the next one."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from arriero.train.hardware import keep_freed_memory

keep_freed_memory(sys.argv[1] == "keep")
for _ in range(23):  # until the heap has found its shape
    torch.ones(17_000_003)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(7):
    torch.ones(17_000_003)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator is what is told"
)
def test_freed_memory_is_kept_for_the_next_step():
    pages = 17_000_003 * 4 // 4096
    assert faults("keep") < pages / 7  # none but stray ones
    assert faults("give back") > pages / 7  # pages of 2 MB where the system has them, else seven times each
