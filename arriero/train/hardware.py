"""What this machine can do at most, measured: the denominator of every share that we report."""

from __future__ import annotations

import functools
import os
import time

import psutil
import torch

from arriero.errors import ConfigError


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


def refuse_what_cannot_fit(name: str, n_params: int) -> None:
    """Raise `ConfigError` where this machine cannot hold its share of weights, gradients and moments.

    12 bytes a parameter (fp32 weight and gradient, and one moment at least) over all processes: less than any run
    takes, so what could fit is never refused. `arriero plan` tells more.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        held, where = torch.cuda.mem_get_info()[1], "the GPU"
    else:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        held, where = psutil.virtual_memory().total // beside, "this machine"
    needed = 12 * n_params // processes
    if needed > held:
        raise ConfigError(
            f"{name}: weights, gradients and optimizer of {n_params:,} parameters take at least {needed / 1e9:,.0f} GB "
            f"in each of {processes} processes, and {where} has {held / 1e9:,.0f} GB for each; start more processes "
            "(torchrun), or take a smaller shape"
        )
