"""Prefill and sampled decoding: Arriero's engine by number type, against other engines, by turns.

    python bench/inference.py [--rounds 3] [--batches 1 8 32] [--only arriero-bf16 llama.cpp-BF16 ...]

SmolLM2-135M, prompts of 32 tokens (prefill: 512), 48 new ones, temperature 0.6 and top-p 0.9, as many threads each as
torch takes, or one thread by its processor time (`--cpu-time`). Peers (bench/peers.py) are measured where they can be
imported: llama.cpp, OpenVINO, ONNX Runtime, transformers, each as its own library runs it, in a process
of its own that sleeps while others are measured. transformers' `generate` gives tokens/s of whole batches, prompts
included. Prints one JSON line: medians in tokens/s, and the bandwidth of a plain read in the same run, which bounds
decoding one answer (bytes of the weights that a token reads / bandwidth).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peers import MODEL, NEW, PEERS, PREFILL, Way

from arriero.checkpoint.load import load_model
from arriero.infer.config import ActivationBits
from arriero.infer.engine import Engine
from arriero.infer.measure import decode_speed, of_type, prefill_speed

Maker = Callable[[Path, str], Way]


def arriero(folder: Path, type: str) -> Way:
    """type: that of the matrices, "-a8" behind it for activations in eight bits."""
    model = load_model(MODEL, dtype=torch.bfloat16).requires_grad_(False)
    kind, _, eight = type.partition("-")
    bits: ActivationBits = 8 if eight else 15
    engine = Engine(of_type(model, kind), max_running=64, step_tokens=512, context=1024, activation_bits=bits)

    def run(batch: int, turn: int) -> float:
        return decode_speed(engine, batch, NEW, turn) if batch else prefill_speed(engine, PREFILL, turn)

    return run


WAYS: dict[str, tuple[Maker, str, str]] = {
    f"arriero-{type}": (arriero, type, "arriero") for type in ("bf16", "int8", "int8-a8", "int4", "int4-a8")
} | PEERS


def apart(maker: Maker, type: str, folder: Path, cpu_time: bool) -> Way:
    """The way that `maker` makes, in a process of its own: some libraries cannot lie in one process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(maker, type, folder, cpu_time, theirs), daemon=True).start()
    theirs.close()

    def run(batch: int, turn: int) -> float:
        ours.send((batch, turn))
        speed: float = ours.recv()
        return speed

    return run


def _serve(maker: Maker, type: str, folder: Path, cpu_time: bool, theirs: Connection) -> None:
    if cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    way = maker(folder, type)
    while True:
        try:
            theirs.send(way(*theirs.recv()))
        except EOFError:
            return


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
    parser.add_argument("--only", nargs="+", choices=list(WAYS), metavar="WAY", help="ways to measure; all that can be")
    parser.add_argument("--files", type=Path, help="a folder to keep peers' files in, for the next time")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for machines that others work on")
    args = parser.parse_args()
    names = args.only or list(WAYS)
    missing = [name for name in names if importlib.util.find_spec(WAYS[name][2]) is None]
    result: dict[str, Any] = {"bench": "inference", "rounds": args.rounds, "threads": torch.get_num_threads()}
    result |= {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "not_here": missing}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.files or Path(scratch)
        ways: dict[str, Way] = {}
        for name in names:
            if name not in missing:
                maker, type, _ = WAYS[name]
                ways[name] = apart(maker, type, folder, args.cpu_time)
                ways[name](1, 0)  # its files are made and it is warm before the next one starts
        found: dict[str, dict[int, list[float]]] = {name: {} for name in ways}
        for turn in range(args.rounds):
            for name, way in ways.items():
                time.sleep(1)  # threads of the way before may wait in a busy loop for a while
                for batch in (0, *args.batches):
                    found[name].setdefault(batch, []).append(way(batch, turn + 1))
                print(turn, name, {b: round(v[-1], 1) for b, v in found[name].items()}, file=sys.stderr, flush=True)
    for name, speeds in found.items():
        result[name] = {f"batch_{b}" if b else "prefill": round(statistics.median(v), 1) for b, v in speeds.items()}
    result["gb_per_s"] = round(bandwidth(), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
