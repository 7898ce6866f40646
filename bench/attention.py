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
from arriero.model.layout import Documents

HEADS, KV_HEADS, WIDTH = 9, 3, 64
ROWS = {
    "155": Documents.of([155]),
    "340": Documents.of([340]),
    "1024": Documents.of([1024]),
    "6 x 155": Documents.of([155] * 6),
    "400 + 600": Documents.of([400, 600]),
    "7 x 140 that share 41": Documents.of([41] + [140] * 7, [-1] + [0] * 7),
    "4 groups of 8 x 24 that share 48": Documents.of(
        ([48] + [24] * 8) * 4, [9 * g if i else -1 for g in range(4) for i in range(9)]
    ),
}


def measure(documents: Documents, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run: keys "C++ forward", "torch forward", ..."""
    total, where = documents.n_tokens, documents.attention(0)
    assert isinstance(where, attention.PackedOnCpu)
    q, grad = torch.randn(2, total, HEADS, WIDTH).bfloat16()
    k, v = torch.randn(2, total, KV_HEADS, WIDTH).bfloat16()
    seconds: dict[str, list[float]] = {}
    library = attention.load_library()
    for _ in range(repeats):
        for name, found in (("C++", library), ("torch", None)):
            with patch.object(attention, "load_library", lambda found=found: found):
                started = time.perf_counter()
                out, logsumexp = attention._packed_cpu(q, k, v, where.bounds, where.leads)
                middle = time.perf_counter()
                attention._packed_cpu_backward(grad, q, k, v, out, logsumexp, where.bounds, where.leads)
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
    for name, documents in ROWS.items():
        each = zip(documents.lengths, documents.before, strict=True)
        pairs = sum(n * (n + 1) / 2 + before * n for n, before in each)
        medians = {key: statistics.median(runs) for key, runs in measure(documents, args.repeats).items()}
        row = {f"{key} ms": round(seconds * 1e3, 2) for key, seconds in medians.items()}
        for way, products in (("forward", 2), ("backward", 5)):
            row[f"C++ {way} GFLOP/s"] = round(products * 2 * pairs * WIDTH * HEADS / medians[f"C++ {way}"] / 1e9)
        report[name] = row
    print(json.dumps(report))


if __name__ == "__main__":
    main()
