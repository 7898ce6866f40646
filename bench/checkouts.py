"""Two checkouts of Arriero on the same recipes, by turns: what a change costs or gains in speed and memory.

    git worktree add ../before f90e046
    python bench/checkouts.py --before ../before [--rounds 3] [--only lora 30m ...]

Each turn is the command that a user types, with its defaults: compiled, validated, saved. A run's first steps compile
and are left out; speed is the median of the others, memory the largest that a step reports. The two run the same steps
from the same seed, so their last losses are compared too. `decode` is bench/decode.py of each checkout.
Prints one JSON line: per recipe both medians over the rounds, their ratio (after / before; above 1 is faster), memory's
ratio, and the last losses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
RECIPES = {
    "lora": "sft smollm2-135m --data {data}/pairs/train.jsonl --validation {data}/pairs/validation.jsonl"
    " --steps 12 --batch-rows 2 --seq-len 1024 --lr 1e-3 --validate-every 6 --samples 0 --compile on",
    "10m": "pretrain 10m --data {data}/shards --optimizer muon --lr 5e-3 --steps 40 --seq-len 512 --batch-rows 16"
    " --micro-rows 4 --validate-every 20 --validation-tokens 8192 --compile on --prompts x",
    "30m": "pretrain 30m --data {data}/shards --steps 25 --seq-len 512 --batch-rows 8 --micro-rows 8"
    " --validate-every 10 --validation-tokens 4096 --compile on --prompts x",
    "124m": "pretrain 124m --data {data}/shards --steps 10 --seq-len 1024 --batch-rows 4 --micro-rows 2"
    " --validate-every 5 --validation-tokens 4096 --compile on --prompts x",
}
COMPILING = 3  # steps of a run that are left out


def arriero(checkout: Path, command: list[str]) -> None:
    """Run a command of a checkout; what it prints is shown where it fails."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-m", "arriero", *command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def prepare(data: Path) -> None:
    """The demo's pairs and shards of the standard library, by this checkout."""
    if not (data / "pairs" / "stats.json").exists():
        arriero(HERE, ["data", "build", "docstrings", str(data / "pairs"), "--held-out", "0.025"])
    for done, command in (
        ("corpus/manifest.json", "curate stdlib --out {0}/corpus"),
        ("tokenizer/tokenizer.json", "tokenizer train {0}/corpus --kind llama3 --vocab-size 4096 --out {0}/tokenizer"),
        ("shards/train/manifest.json", "shard {0}/corpus --tokenizer {0}/tokenizer --validation 0.05 --out {0}/shards"),
    ):
        if not (data / done).exists():
            arriero(HERE, command.format(data).split())


def train(checkout: Path, recipe: str, data: Path) -> dict[str, float]:
    """Tokens/s, peak memory in MB and the last loss of one run."""
    out = data / "run"
    shutil.rmtree(out, ignore_errors=True)
    arriero(checkout, [*RECIPES[recipe].format(data=data).split(), "--out", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_s" in line]
    return {
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps[COMPILING:]),
        "memory_mb": max(step["memory_bytes"] for step in steps) / 1e6,
        "loss": steps[-1]["loss"],
    }


def decode(checkout: Path) -> dict[str, float]:
    """Tokens/s of bench/decode.py, greedy, without transformers' compiled decode."""
    command = [sys.executable, str(checkout / "bench" / "decode.py"), "--no-compiled", "--rounds", "3"]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    line = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    found = json.loads(line)
    return {"tokens_per_s": found["tokens_per_s"]["arriero"]["median"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[*RECIPES, "decode"], choices=[*RECIPES, "decode"])
    parser.add_argument("--data", type=Path, default=Path("out/checkouts"), help="where data is made, once")
    args = parser.parse_args()
    if args.before is None:
        print(json.dumps({"bench": "checkouts", "left_out": "needs --before, another checkout to compare with"}))
        return
    args.data.mkdir(parents=True, exist_ok=True)
    prepare(args.data)
    result: dict[str, Any] = {"bench": "checkouts", "rounds": args.rounds}
    for name in args.only:
        turns: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for turn in range(args.rounds):
            order = [("before", args.before.resolve()), ("after", HERE)]
            for which, checkout in order if turn % 2 == 0 else reversed(order):
                found = decode(checkout) if name == "decode" else train(checkout, name, args.data)
                turns[which].append(found)
                print(name, which, found, file=sys.stderr, flush=True)
        speed = {w: statistics.median(t["tokens_per_s"] for t in found) for w, found in turns.items()}
        each = {w: [round(t["tokens_per_s"], 1) for t in found] for w, found in turns.items()}
        result[name] = {**each, "ratio": round(speed["after"] / speed["before"], 3)}
        if name != "decode":
            memory = {w: statistics.median(t["memory_mb"] for t in found) for w, found in turns.items()}
            result[name] |= {
                "memory_mb": {w: round(value) for w, value in memory.items()},
                "memory_ratio": round(memory["after"] / memory["before"], 3),
                "last_loss": {w: sorted({t["loss"] for t in found}) for w, found in turns.items()},
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
