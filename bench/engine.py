"""What the engine's features cost or gain, each against the same engine without it, by short turns.

    python bench/engine.py [--only sampled speculation context busy opening] [--kind bf16] [--rounds 12]

Turns of some 24 tokens alternate, so that what else the machine does meets both alike; a line gives the median of the
ratios of neighbouring turns, with quartiles, by the clock and by the processor time of all threads.

sampled: temperature 0.6 and top-p 0.9 against greedy, at 1, 8 and 16 answers. speculation: n-gram look-up of 8 tokens
against none, on a text that is to be repeated with a small edit. context: a token at position 4,096 against one at 64,
with the bytes that its attention reads beside those of the weights. busy: decoding with an adapter beside a process
that keeps one core busy, against none. opening: seconds and peak memory of opening a model for the engine.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from arriero.checkpoint.load import load_model, load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.measure import of_type
from arriero.infer.request import Request
from arriero.infer.torch_step import computed_in
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.base import Tokenizer

NEW = 24  # tokens of a turn
GREEDY, SAMPLED = SamplingConfig(), SamplingConfig(temperature=0.6, top_p=0.9, seed=0)
TEXT = (
    "Repeat this text with every 'mule' replaced by 'horse':\n\nAn arriero leads a mule train over the pass. Each mule "
    "carries two bags, and no mule carries more than the others. The arriero walks behind the last mule and counts.\n\n"
    "An arriero leads a horse train over the pass."
)

Turn = Callable[[], tuple[float, float]]
"""One turn: seconds by the clock and of processor time, each for a token."""


def decoding(engine: Engine, requests: list[Request]) -> Turn:
    def turn() -> tuple[float, float]:
        for request in requests:
            engine.submit(request)
        begun: set[int] = set()
        while len(begun) < len(requests):
            begun |= {event.request for event in engine.step()}
        clock, cpu, tokens = time.perf_counter(), time.process_time(), 0
        while engine.busy:
            tokens += len(engine.step())
        return (time.perf_counter() - clock) / tokens, (time.process_time() - cpu) / tokens

    return turn


def ratios(one: Turn, other: Turn, rounds: int) -> dict[str, Any]:
    """other / one, by turns."""
    one(), other()
    clock, cpu, ms = [], [], []
    for i in range(rounds):
        first, second = (one(), other()) if i % 2 else (other(), one())[::-1]
        clock.append(second[0] / first[0])
        cpu.append(second[1] / first[1])
        ms.append((1000 * first[0], 1000 * second[0]))
    quartiles = [[round(q, 3) for q in statistics.quantiles(x, n=4)] for x in (clock, cpu)]
    best = [round(min(column), 2) for column in zip(*ms, strict=True)]
    return {"clock": quartiles[0], "cpu": quartiles[1], "best_ms_a_token": best}


def ids_of(n: int, seed: int) -> list[int]:
    return torch.randint(100, 1000, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(n: int, sampling: SamplingConfig, length: int = 32, **more: Any) -> list[Request]:
    return [Request(ids_of(length, i), NEW, sampling, stop_ids=(), text=False, **more) for i in range(n)]


def sampled(model: Llama, _: Tokenizer, rounds: int) -> dict[str, Any]:
    engine = Engine(model, max_running=16, context=256)
    return {
        f"at {n}": ratios(decoding(engine, requests(n, GREEDY)), decoding(engine, requests(n, SAMPLED)), rounds)
        for n in (1, 8, 16)
    }


def speculation(model: Llama, tokenizer: Tokenizer, rounds: int) -> dict[str, Any]:
    prompt, found = tokenizer.encode(TEXT), {}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        request = Request(prompt, 48, sampling, stop_ids=(), text=False)
        turns, ids = [], []
        for speculate in (0, 8):
            engine = Engine(model, tokenizer, speculate=speculate, context=512)
            ids.append(engine.generate([request])[0][0].ids)
            turns.append(decoding(engine, [request]))
        found[name] = ratios(turns[0], turns[1], rounds) | {"same": ids[0] == ids[1]}
    return found


def context(model: Llama, _: Tokenizer, rounds: int) -> dict[str, Any]:
    engine, config = Engine(model, cache_tokens=4500, max_running=1, context=4200), model.config
    near, far = (decoding(engine, requests(1, GREEDY, n)) for n in (64, 4096))
    read = 2 * 4096 * config.n_layers * config.n_kv_heads * config.head_dim * computed_in(model).itemsize
    return ratios(near, far, rounds) | {"mb_of_attention": read / 1e6, "mb_of_weights": engine.memory["weights"] / 1e6}


def busy(model: Llama, _: Tokenizer, rounds: int) -> dict[str, Any]:
    config = LoraConfig(rank=16)
    engine = Engine(model, context=256)
    engine.load_adapter("one", (config, adapter_of(model, config)))
    alone = decoding(engine, requests(1, SAMPLED, adapter="one"))

    def beside() -> tuple[float, float]:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.2)
            return alone()
        finally:
            other.kill()
            other.wait()

    return ratios(alone, beside, rounds)


def adapter_of(model: Llama, config: LoraConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        other = add_lora(Llama(model.config), config)
    return {name: torch.randn(p.shape) * 0.01 for name, p in lora_state(other).items()}


def opening(name: str, kind: str) -> dict[str, float]:
    """In a process of its own: seconds, and megabytes of memory at most, beyond those of the imports."""
    code = (
        "import resource, time, torch\n"
        "from arriero.checkpoint.load import load\nfrom arriero.infer.engine import Engine\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n"
        "began, before = time.perf_counter(), peak()\n"
        f"how = dict(dtype=torch.bfloat16, quantize={('' if kind == 'bf16' else kind)!r}, filed=True)\n"
        f"model, tokenizer = load({name!r}, **how)\n"
        "loaded = peak(); engine = Engine(model, tokenizer, cache_tokens=32)\n"
        "print(time.perf_counter() - began, loaded - before, peak() - before, engine.memory['weights'] / 1e6)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(("seconds", "mb_loaded", "mb_peak", "mb_held"), map(float, out), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"sampled": sampled, "speculation": speculation, "context": context, "busy": busy}
    parser.add_argument("--only", nargs="+", default=[*ways, "opening"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kind", default="bf16", choices=["bf16", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    result: dict[str, Any] = {"bench": "engine", "model": args.model, "kind": args.kind}
    if "opening" in args.only:
        result["opening"] = opening(args.model, args.kind)
    names = [name for name in args.only if name in ways]
    if names:
        tokenizer = load_tokenizer_at(resolve(args.model))
        model = of_type(load_model(args.model, dtype=torch.bfloat16).requires_grad_(False), args.kind)
    for name in names:
        result[name] = ways[name](model, tokenizer, args.rounds)
        print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps(result))


if __name__ == "__main__":
    main()
