"""What the engine itself costs in a step: scheduling, texts and events, without the model and the sampler.

A step that computes nothing stands for the model, so what is measured is the rest of `Engine.step`: for 1, 16 and 64
requests that are being answered, without and with log-probabilities; the fastest tenth and the median of 400 steps, in
ms. Prints one line of JSON.

    python bench/scheduler.py [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from arriero.checkpoint.load import load_model, load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.infer import choose
from arriero.infer import engine as module
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.step import StepInput

STEPS = 400


class Nothing:
    """A step of the right shapes."""

    n_blocks = 4000
    share = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.logits = torch.randn(64, vocab_size)

    def __call__(self, batch: StepInput) -> Tensor:
        return self.logits[: len(batch.outputs)]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Nothing lies in them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=torch.bfloat16), load_tokenizer_at(resolve(args.model))
    step: Any = Nothing(model.head.out_features)
    sampling, sample = [0.0], choose.sample

    def timed(logits: Tensor, rows: Sequence[SamplerRow], share: None) -> Any:
        began = time.perf_counter()
        chosen = sample(logits, rows, share)
        sampling[0] += time.perf_counter() - began
        return chosen

    result: dict[str, Any] = {"bench": "scheduler", "model": args.model}
    with mock.patch.object(module, "open_step", lambda *_: step), mock.patch.object(choose, "sample", timed):
        for n, logprobs in ((1, None), (16, None), (16, 0), (64, None)):
            engine = Engine(model, tokenizer)
            for i in range(n):
                prompt = [100 + i, 200] * 100
                engine.submit(Request(prompt, 1000, SamplingConfig(), stop_ids=(), logprobs=logprobs))
            while len(engine.step()) < n:
                pass
            took = []
            for _ in range(STEPS):
                sampling[0], began = 0.0, time.perf_counter()
                engine.step()
                took.append(1000 * (time.perf_counter() - began - sampling[0]))
            name = f"{n}" if logprobs is None else f"{n} with log-probabilities"
            result[name] = [round(statistics.quantiles(took, n=10)[0], 3), round(statistics.median(took), 3)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
