"""Rollouts: sampled answers with their log-probabilities, prompts included, against transformers' `generate`, by turns.

    python bench/rollouts.py [--rounds 5] [--peer-dtype fp32]

SmolLM2-135M; 32 prompts of 32 tokens, 64 new ones, temperature 1 over the whole vocabulary. Ours in bf16, by the engine
as RL drives it: all requests at once, the log-probability of each token, no texts, no prefix found in the cache.
transformers is measured in the type in which it is fastest here (fp32 on a CPU without instructions for bf16, else
bf16), one padded batch, no log-probabilities. Prints one JSON line: new tokens/s by the clock, and of processor time,
each turn, and the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from arriero.checkpoint.load import load_model
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.model.llama import Llama
from arriero.quant.products import computed_in

N, PROMPT, NEW = 32, 32, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def prompts(turn: int) -> torch.Tensor:
    """Ids [N, PROMPT]."""
    return torch.randint(100, 40_000, (N, PROMPT), generator=torch.Generator().manual_seed(turn))


def ours(model: Llama) -> Callable[[int], None]:
    engine = Engine(model, max_running=N, step_tokens=512, context=PROMPT + NEW)

    def run(turn: int) -> None:
        sampling = SamplingConfig(temperature=1.0, seed=turn)
        requests = [Request(ids, NEW, sampling, stop_ids=(), logprobs=0, text=False) for ids in prompts(turn).tolist()]
        found = engine.generate(requests)
        assert all(len(answer.ids) == len(answer.logprobs or ()) == NEW for [answer] in found)

    return run


def theirs(model: Llama, dtype: torch.dtype) -> Callable[[int], None]:
    transformers.logging.set_verbosity_error()
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf())).to(dtype).eval()
    other.load_state_dict(model.state_dict())

    @torch.inference_mode()
    def run(turn: int) -> None:
        torch.manual_seed(turn)
        ids = prompts(turn)
        out: Any = other.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True,
            temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert out.shape == (N, PROMPT + NEW)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-dtype", choices=DTYPES)
    args = parser.parse_args()
    multiplies = computed_in(torch.bfloat16, "cpu") == torch.bfloat16
    dtype = DTYPES[args.peer_dtype or ("bf16" if multiplies else "fp32")]
    model = load_model("smollm2-135m", dtype=torch.bfloat16).requires_grad_(False)
    ways = {"arriero bf16": ours(model), f"transformers {dtype}": theirs(model, dtype)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(-1, args.rounds):  # the first warms up
        for name, run in ways.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run(turn + 1)
            speeds = tuple(
                round(N * NEW / took, 1) for took in (time.perf_counter() - clock, time.process_time() - cpu)
            )
            if turn >= 0:
                found[name].append(speeds)  # type: ignore[arg-type]
            print(turn, name, speeds, file=sys.stderr, flush=True)
    one, other = found.values()
    ratios = [statistics.median(a[i] / b[i] for a, b in zip(one, other, strict=True)) for i in range(2)]
    result = {"bench": "rollouts", "threads": torch.get_num_threads(), **found, "ratio": [round(r, 2) for r in ratios]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
