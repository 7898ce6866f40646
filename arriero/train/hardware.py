"""What this machine can do at most, measured (the denominator of every share that we report), and its memory."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from arriero.data.batch import Batch
from arriero.errors import ConfigError
from arriero.model.config import LlamaConfig
from arriero.quant.products import computed_in


@functools.cache
def matmul_peak(device: str, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a size^3 matrix product in the type that those of `dtype` are computed in, the best of ten.

    A tenth of a second on two cores with AVX-512.
    """
    a = torch.randn(size, size, device=device).to(computed_in(dtype, device))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def seconds_at_peak(shape: LlamaConfig, device: str, dtype: torch.dtype) -> Callable[[Sequence[Batch]], float]:
    """How long a global batch would take at the measured speed of large matrix products: the numerator of `mfu`."""
    peak = matmul_peak(device, dtype)

    def seconds(batches: Sequence[Batch]) -> float:
        flops = 0.0
        for batch in batches:
            lengths = torch.tensor(batch.documents.lengths, dtype=torch.float64)
            context = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())  # causal, within documents
            flops += batch.n_trained * shape.flops_per_token(context)
        return flops / peak

    return seconds


def keep_freed_memory(keep: bool = True) -> None:
    """Let glibc keep large blocks that are freed, since the next step asks for the same sizes again.

    By itself it gives blocks of 32 MB and more back to the system and maps them anew, and each of their pages is then
    cleared and faulted in: 600,000 pages in a step that pretrains 124M parameters, an eighth of its time. Price: what
    lies between blocks of other sizes, some hundredths of the peak. keep=False: what glibc does, once it has adapted.
    Other C libraries, and GPUs' memory, are left alone.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc.mallopt(mmap_threshold, 2**31 - 1 if keep else 32 * 2**20)
    libc.mallopt(trim_threshold, -1 if keep else 64 * 2**20)
    if not keep:
        libc.malloc_trim(0)


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
