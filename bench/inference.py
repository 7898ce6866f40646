"""Prefill and sampled decoding: Arriero's engine by number type, against llama.cpp and transformers, by turns.

    python bench/inference.py [--rounds 3] [--batches 1 8 32] [--only arriero-bf16 llama.cpp-BF16 ...]

SmolLM2-135M, prompts of 32 tokens (prefill: 512), 48 new ones, temperature 0.6 and top-p 0.9, as many threads each as
torch takes, or one thread by its processor time (`--cpu-time`). llama.cpp is measured where llama-cpp-python can be
imported (built natively, with CMAKE_ARGS=-DGGML_NATIVE=ON); its files are Arriero's own GGUF in BF16, Q8_0 and Q4_0.
transformers' `generate` gives tokens/s of whole batches, prompts included. Prints one JSON line: medians in tokens/s,
and the bandwidth of a plain read in the same run, which bounds decoding one answer (bytes of the weights that a token
reads / bandwidth).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arriero.checkpoint.convert import convert
from arriero.checkpoint.load import load_model
from arriero.checkpoint.quantize import quantize
from arriero.infer.engine import Engine
from arriero.infer.measure import decode_speed, of_type, prefill_speed

PROMPT, NEW, PREFILL = 32, 48, 512
LIVING: list[Any] = []
TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}

Way = Callable[[int, int], float]
"""(answers at a time, or 0 for prefill; the round) -> tokens/s."""


def arriero(kind: str) -> Way:
    model = load_model("smollm2-135m", dtype=torch.bfloat16).requires_grad_(False)
    engine = Engine(of_type(model, kind), max_running=64, step_tokens=512, context=1024)

    def run(batch: int, turn: int) -> float:
        return decode_speed(engine, batch, NEW, turn) if batch else prefill_speed(engine, PREFILL, turn)

    return run


def llama_cpp(path: Path) -> Way:
    import llama_cpp as c

    quiet = c.llama_log_callback(lambda *_: None)
    LIVING.append(quiet)  # called for as long as the library lives
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    params = c.llama_model_default_params()
    model = c.llama_model_load_from_file(str(path).encode(), params)
    settings = c.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 64 * 128, 512, 512, 64
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    settings.kv_unified = True
    context = c.llama_init_from_model(model, settings)
    batch = c.llama_batch_init(2048, 0, 1)
    samplers = []
    for seed in range(64):
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for sampler in (
            c.llama_sampler_init_top_p(0.9, 1),
            c.llama_sampler_init_temp(0.6),
            c.llama_sampler_init_dist(seed),
        ):
            c.llama_sampler_chain_add(chain, sampler)
        samplers.append(chain)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if c.llama_decode(context, batch):
            raise SystemExit("llama.cpp: llama_decode failed")

    def run(n: int, turn: int) -> float:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        length = PROMPT if n else PREFILL
        began = time.perf_counter()
        last = []
        for s in range(max(n, 1)):
            ids = torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(turn * 64 + s)).tolist()
            decode([(token, p, s, p == length - 1) for p, token in enumerate(ids)])
            last.append(c.llama_sampler_sample(samplers[s], context, length - 1))
        if not n:
            return length / (time.perf_counter() - began)
        began = time.perf_counter()
        for step in range(NEW):
            decode([(token, PROMPT + step, s, True) for s, token in enumerate(last)])
            last = [c.llama_sampler_sample(samplers[s], context, s) for s in range(n)]
        return n * NEW / (time.perf_counter() - began)

    return run


def transformers_generate() -> Way:
    import transformers

    transformers.logging.set_verbosity_error()
    model = load_model("smollm2-135m", dtype=torch.bfloat16)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf())).to(torch.bfloat16).eval()
    other.load_state_dict(model.state_dict())

    @torch.inference_mode()
    def run(n: int, turn: int) -> float:
        torch.manual_seed(turn)
        ids = torch.randint(0, 100, (max(n, 1), PROMPT if n else PREFILL))
        began, new = time.perf_counter(), NEW if n else 1
        other.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True,
            temperature=0.6, top_p=0.9, top_k=0, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return (n * NEW if n else PREFILL) / (time.perf_counter() - began)

    return run


def bandwidth() -> float:
    """GB/s of reading 512 MB on all threads: the best of ten."""
    memory = torch.zeros(1 << 27)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        memory.sum()
        best = max(best, memory.nbytes / (time.perf_counter() - began) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", help="ways to measure; all that can be")
    parser.add_argument("--files", type=Path, help="a folder to keep llama.cpp's files in, for the next time")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for machines that others work on")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    result: dict[str, Any] = {"bench": "inference", "rounds": args.rounds, "threads": torch.get_num_threads()}
    result |= {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.files or scratch
        makers: dict[str, Callable[[], Way]] = {f"arriero-{kind}": lambda kind=kind: arriero(kind) for kind in TYPES}  # type: ignore[misc]
        for kind, name in TYPES.items():
            makers[f"llama.cpp-{name}"] = lambda kind=kind: llama_cpp(gguf(Path(folder), kind))  # type: ignore[misc]
        makers["transformers"] = transformers_generate
        try:
            import llama_cpp as _  # noqa: F401
        except ImportError:
            makers = {name: make for name, make in makers.items() if "llama.cpp" not in name}
            result["left_out"] = "llama.cpp: no llama-cpp-python here"
        ways = {name: make() for name, make in makers.items() if args.only is None or name in args.only}
        found: dict[str, dict[int, list[float]]] = {name: {} for name in ways}
        for turn in range(-1, args.rounds):  # the first warms up
            for name, way in ways.items():
                for batch in (0, *args.batches) if turn >= 0 else (0, args.batches[0]):
                    speed = way(batch, turn + 1)
                    if turn >= 0:
                        found[name].setdefault(batch, []).append(speed)
                print(turn, name, {b: round(v[-1], 1) for b, v in found[name].items()}, file=sys.stderr, flush=True)
    for name, speeds in found.items():
        result[name] = {f"batch_{b}" if b else "prefill": round(statistics.median(v), 1) for b, v in speeds.items()}
    result["gb_per_s"] = round(bandwidth(), 1)
    print(json.dumps(result))


def gguf(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.gguf"
    folder.mkdir(exist_ok=True)
    if path.exists():
        return path
    if kind == "bf16":
        convert("smollm2-135m", path, to="gguf", dtype="bf16")
    else:
        quantize("smollm2-135m", path, type=kind, format="gguf")  # type: ignore[arg-type]
    return path


if __name__ == "__main__":
    main()
