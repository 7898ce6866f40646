"""Packed attention, forward and backward: attention.cpp and its twin in torch, alternating in one process.

    python bench/attention.py [--threads 2] [--repeats 21]

Shapes of SmolLM2-135M (9 heads, 3 KV heads, width 64), bf16. Prints one JSON line: for each row of documents the median
milliseconds of one layer's call, and the C++'s useful GFLOP/s: only pairs of tokens that see each other count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from unittest.mock import patch

import torch

from arriero.model import attention

HEADS, KV_HEADS, WIDTH = 9, 3, 64
ROWS = {  # name: document lengths, prefix
    "155": ([155], 0),
    "340": ([340], 0),
    "1024": ([1024], 0),
    "6 x 155": ([155] * 6, 0),
    "400 + 600": ([400, 600], 0),
    "7 x 140 that share 41": ([41] + [140] * 7, 41),
}


def measure(lengths: list[int], prefix: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run: keys "C++ forward", "torch forward", ..."""
    total, cu = sum(lengths), torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, grad = torch.randn(2, total, HEADS, WIDTH).bfloat16()
    k, v = torch.randn(2, total, KV_HEADS, WIDTH).bfloat16()
    seconds: dict[str, list[float]] = {}
    library = attention.load_library()
    for _ in range(repeats):
        for name, found in (("C++", library), ("torch", None)):
            with patch.object(attention, "load_library", lambda found=found: found):
                started = time.perf_counter()
                out, logsumexp = attention._packed_cpu(q, k, v, cu, prefix)
                middle = time.perf_counter()
                attention._packed_cpu_backward(grad, q, k, v, out, logsumexp, cu, prefix)
                seconds.setdefault(f"{name} forward", []).append(middle - started)
                seconds.setdefault(f"{name} backward", []).append(time.perf_counter() - middle)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    assert attention.load_library() is not None, "attention.cpp did not compile here"
    report: dict[str, object] = {"bench": "attention", "threads": args.threads, "torch": torch.__version__}
    for name, (lengths, prefix) in ROWS.items():
        pairs = sum(n * (n + 1) / 2 + (prefix * n if i else 0) for i, n in enumerate(lengths))
        medians = {key: statistics.median(runs) for key, runs in measure(lengths, prefix, args.repeats).items()}
        row = {f"{key} ms": round(seconds * 1e3, 2) for key, seconds in medians.items()}
        for way, products in (("forward", 2), ("backward", 5)):
            row[f"C++ {way} GFLOP/s"] = round(products * 2 * pairs * WIDTH * HEADS / medians[f"C++ {way}"] / 1e9)
        report[name] = row
    print(json.dumps(report))


if __name__ == "__main__":
    main()
