"""Sampling the next token: milliseconds a row, by setting, at two vocabularies; C++ and its twin in torch.

Logits are normal numbers of deviation 2.5, about as peaked as a small model's. Times are of one thread: medians of
calls with 8 rows, by the clock and by the thread's own CPU time, which what runs beside does not lengthen. Prints one
JSON line.

    python bench/sampling.py [--rounds 40]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from arriero.infer import sample as sampling
from arriero.infer.config import SamplingConfig
from arriero.infer.sampler_row import SamplerRow

ROWS = 8
LONG = {"prompt": list(range(1000)), "answer": list(range(500, 1500)), "logprobs": True}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "temperature 1": ({"temperature": 1.0}, {}),
    "temperature 1, log-probabilities": ({"temperature": 1.0}, {"logprobs": True}),
    "temperature 0.6, top-p 0.9": ({"temperature": 0.6, "top_p": 0.9}, {}),
    "the same, log-probabilities": ({"temperature": 0.6, "top_p": 0.9}, {"logprobs": True}),
    "the same, and the 20 best": ({"temperature": 0.6, "top_p": 0.9}, {"logprobs": True, "n_top": 20}),
    "temperature 1.5, top-p 0.95": ({"temperature": 1.5, "top_p": 0.95}, {}),
    "temperature 0.8, top-k 50": ({"temperature": 0.8, "top_k": 50}, {}),
    "top-k 40, top-p 0.95, min-p 0.05": ({"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}, {}),
    "penalties on 2,000 tokens, top-p 0.9": (
        {"repetition_penalty": 1.1, "temperature": 0.6, "top_p": 0.9, "presence_penalty": 0.5},
        LONG,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for vocab in (49_152, 128_256):
        logits = torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(0)) * 2.5
        for name, (settings, asked) in SETTINGS.items():
            rows = [SamplerRow(SamplingConfig(**settings), seed=i, **asked) for i in range(ROWS)]
            clock, cpu = timed(lambda logits=logits, rows=rows: sampling.sample(logits, rows), args.rounds)
            results[f"{vocab}, {name}"] = {"ms": clock, "cpu_ms": cpu}
    load, sampling.load_library = sampling.load_library, lambda: None  # type: ignore[assignment]
    rows = [SamplerRow(SamplingConfig(temperature=0.6, top_p=0.9), seed=i) for i in range(ROWS)]
    logits = torch.randn(ROWS, 49_152, generator=torch.Generator().manual_seed(0)) * 2.5
    clock, cpu = timed(lambda: sampling.sample(logits, rows), 5)
    results["49152, temperature 0.6, top-p 0.9, in torch"] = {"ms": clock, "cpu_ms": cpu}
    sampling.load_library = load
    print(json.dumps({"bench": "sampling", "machine": platform.processor() or platform.machine(), "per_row": results}))


def timed(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds a row by the clock and of CPU: medians."""
    run()
    clock, cpu = [], []
    for _ in range(rounds):
        began, cpu_began = time.perf_counter(), time.thread_time()
        run()
        cpu.append(time.thread_time() - cpu_began)
        clock.append(time.perf_counter() - began)
    return tuple(round(statistics.median(times) * 1000 / ROWS, 4) for times in (clock, cpu))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
