"""Answers behind one prompt against the same answers each behind its own: a step of training, taking turns.

    python bench/shared_prompts.py [--groups 4] [--rounds 7] [--layers 30]

A group is 8 answers of 24 tokens to a prompt of 48, as a preference pair or a group of sampled answers is. The shape is
SmolLM2-135M's with random weights, bf16, compiled blocks, all weights trained; a step is forward and backward of a row.
Prints one JSON line: milliseconds of both (medians), and how many times as fast sharing is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import numpy as np
import torch

from arriero.data.batch import IGNORED, Batch, Row, collate
from arriero.distributed.parallelize import prepare
from arriero.model.catalogue import SHAPES
from arriero.model.llama import Llama
from arriero.train.objectives import next_token

PROMPT, ANSWERS, LENGTH = 48, 8, 24


def rows(shared: bool, group: int, vocabulary: int) -> list[Row]:
    """The answers of a group, trained, behind a prompt that is not."""
    rng = np.random.default_rng(group)
    prompt = rng.integers(0, vocabulary, PROMPT).astype(np.int32)
    answers = [rng.integers(0, vocabulary, LENGTH).astype(np.int32) for _ in range(ANSWERS)]
    ignored = np.full(PROMPT, IGNORED)
    targets = [np.append(answer[1:], IGNORED).astype(np.int64) for answer in answers]
    if not shared:
        return [
            Row(np.append(prompt, a), np.append(ignored, t), np.array([PROMPT + LENGTH]))
            for a, t in zip(answers, targets, strict=True)
        ]
    return [
        Row(
            np.concatenate([prompt, *answers]),
            np.concatenate([ignored, *targets]),
            np.array([PROMPT, *[LENGTH] * ANSWERS]),
            (-1, *[0] * ANSWERS),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    shape = dataclasses.replace(SHAPES["smollm2-135m"], n_layers=args.layers)
    model = Llama(shape).init_weights(seed=0).set_compute_dtype(torch.bfloat16).train()
    prepare(model, compile=True)
    objective = next_token(compile=True)

    def batch(shared: bool) -> Batch:
        return collate([row for g in range(args.groups) for row in rows(shared, g, shape.vocab_size)])

    def step(one: Batch) -> tuple[float, float]:
        started = time.perf_counter()
        loss = objective.sums(model, one)["loss"]
        (loss / one.n_trained).backward()
        model.zero_grad()
        return time.perf_counter() - started, loss.item() / one.n_trained

    both = {"shared": batch(True), "apart": batch(False)}
    losses = {name: step(one)[1] for name, one in both.items()}
    for one in both.values():
        step(one)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(args.rounds):
        for name, one in both.items():
            seconds[name].append(step(one)[0])
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    print(
        json.dumps(
            {
                "bench": "shared_prompts",
                "threads": torch.get_num_threads(),
                "tokens": {name: one.n_tokens for name, one in both.items()},
                "losses": losses,
                **{f"{name} ms": round(1e3 * value) for name, value in medians.items()},
                "times as fast": round(medians["apart"] / medians["shared"], 2),
                "spread": [round(a / b, 2) for a, b in zip(seconds["apart"], seconds["shared"], strict=True)],
            }
        )
    )


if __name__ == "__main__":
    main()
