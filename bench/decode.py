"""Decoding one sequence: Arriero against transformers' eager `generate` and its compiled static-cache decode.

The same bf16 weights, prompt and number of tokens, greedy, in one process, by turns; prints one JSON line with
tokens/s (median, lowest and highest of the rounds) and the ratios of the medians. `arriero_sampled` and
`transformers_sampled` draw at temperature 0.6 and top-p 0.9 instead, as a chat does.

    python bench/decode.py [--model smollm2-135m] [--tokens 128] [--rounds 5] [--random]

--random takes random weights of the model's published shape: nothing to load, the same work. The last column is
what torch alone reaches: Arriero's own slow twin. Bandwidth is what the weights read a second come to.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import transformers

from arriero.checkpoint.load import load_model
from arriero.infer import native_step
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.model.catalogue import PUBLISHED
from arriero.model.llama import Llama

PROMPT = 32  # tokens
GREEDY, SAMPLED = SamplingConfig(temperature=0), SamplingConfig(temperature=0.6, top_p=0.9, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--no-compiled", action="store_true", help="leave out transformers' compiled decode")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.random:
        model = Llama(PUBLISHED[args.model]).init_weights(seed=0).to(torch.bfloat16)
    else:
        model = load_model(args.model, dtype=torch.bfloat16)
    model.requires_grad_(False)
    prompt = torch.randint(1000, 30_000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    ways: dict[str, Callable[[int], object]] = {
        "arriero": session(model, prompt, native=True),
        "arriero_sampled": session(model, prompt, native=True, sampling=SAMPLED),
        "transformers_eager": reference(model, prompt, PROMPT + args.tokens, compiled=False),
        "transformers_sampled": reference(model, prompt, PROMPT + args.tokens, compiled=False, sampled=True),
        "torch_twin": session(model, prompt, native=False),
    }
    if not args.no_compiled:
        ways["transformers_static_compiled"] = reference(model, prompt, PROMPT + args.tokens, compiled=True)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # compiles and warms up
        way(8)
    for _ in range(args.rounds):
        for name, way in ways.items():
            speeds[name].append(speed(way, args.tokens))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bytes_read = sum(p.numel() * p.element_size() for p in model.parameters())
    result = {
        "bench": "decode", "model": args.model, "dtype": "bf16", "tokens": args.tokens, "prompt": PROMPT,
        "rounds": args.rounds, "threads": torch.get_num_threads(), "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "tokens_per_s": {
            name: {"median": round(medians[name], 1), "min": round(min(v), 1), "max": round(max(v), 1)}
            for name, v in speeds.items()
        },
        "ratio": {n: round(medians["arriero"] / m, 2) for n, m in medians.items() if n != "arriero"},
        "gb_per_s": round(bytes_read * medians["arriero"] / 1e9, 1),
    }  # fmt: skip
    print(json.dumps(result))


def speed(way: Callable[[int], object], tokens: int) -> float:
    """Tokens a second between the first and the last: the time of `tokens`, less that of one (the prefill)."""
    began = time.perf_counter()
    way(1)
    between = time.perf_counter()
    way(tokens)
    return (tokens - 1) / ((time.perf_counter() - between) - (between - began))


def session(
    model: Llama, prompt: list[int], native: bool, sampling: SamplingConfig = GREEDY
) -> Callable[[int], object]:
    with nullcontext() if native else mock.patch.object(native_step, "fits", lambda model, capacity: False):
        engine = Engine(model, cache_tokens=1024)

    def run(tokens: int) -> object:
        return engine.generate([Request(prompt, tokens, sampling)])

    return run


def reference(
    model: Llama, prompt: list[int], capacity: int, compiled: bool, sampled: bool = False
) -> Callable[[int], object]:
    """transformers' `generate`; a static cache makes it compile its decode step."""
    config = transformers.LlamaConfig(**model.config.to_hf())
    other = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if sampled:
        settings |= {"do_sample": True, "temperature": SAMPLED.temperature, "top_p": SAMPLED.top_p, "top_k": 0}
    if compiled:
        settings["compile_config"] = transformers.CompileConfig(fullgraph=False, mode="default")
        settings["compile_config"]._compile_all_devices = True  # its own switch for compiling on a CPU

    def run(tokens: int) -> object:
        cache = transformers.StaticCache(config, max_cache_len=capacity) if compiled else None
        with torch.inference_mode():
            return other.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens,
                min_new_tokens=tokens, **settings,
            )  # fmt: skip

    return run


if __name__ == "__main__":
    main()
