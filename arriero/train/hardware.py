"""What this machine can do at most, measured: the denominator of every share that we report."""

from __future__ import annotations

import functools
import time

import torch


@functools.cache
def matmul_peak(device: str, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a size^3 matrix product, the best of ten; a tenth of a second on two cores."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
