"""Two checkouts of Arriero on the same recipes, step by step: what a change costs or gains in speed and memory.

    git worktree add ../before f90e046
    python bench/checkouts.py --before ../before [--rounds 2] [--only lora 30m ...]

Each run is the command that a user types, with its defaults: compiled, validated, saved. The two checkouts run as two
processes that take turns step by step, so what slows the machine for a second slows both; the one that waits sleeps.
A run's first steps compile and are left out. Speed is the median over all pairs of steps of after / before (above 1
is faster), with its quartiles, and `best`, the ratio of the fastest quarters, which a busy neighbour touches least;
memory is the largest that a step reports. Both run the same steps from the same seed, so their last losses are compared
too. `decode` is bench/decode.py of each checkout, in turns.
Prints one JSON line: per recipe both medians in tokens/s, the ratio, memory's ratio, and the last losses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
RECIPES = {
    "lora": "sft smollm2-135m --data {data}/pairs/train.jsonl --validation {data}/pairs/validation.jsonl"
    " --steps 14 --batch-rows 2 --seq-len 1024 --lr 1e-3 --validate-every 7 --samples 0 --compile on",
    "10m": "pretrain 10m --data {data}/shards --optimizer muon --lr 5e-3 --steps 40 --seq-len 512 --batch-rows 16"
    " --micro-rows 4 --validate-every 20 --validation-tokens 8192 --compile on --prompts x",
    "30m": "pretrain 30m --data {data}/shards --steps 60 --seq-len 512 --batch-rows 8 --micro-rows 8"
    " --validate-every 20 --validation-tokens 4096 --compile on --prompts x",
    "124m": "pretrain 124m --data {data}/shards --steps 10 --seq-len 1024 --batch-rows 4 --micro-rows 2"
    " --validate-every 5 --validation-tokens 4096 --compile on --prompts x",
}
COMPILING = 3  # steps of a run that are left out

# What a child runs: the command line, whose every step waits for a line on standard input and is reported as one on
# standard output. (Everything else that is printed goes to standard error.)
CHILD = """
import json, os, sys
report = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
from arriero.train import loop
step = loop.Trainer.step
def gated(trainer):
    print("ready", file=report, flush=True)
    sys.stdin.readline()
    metrics = step(trainer)
    print(json.dumps({k: metrics[k] for k in ("tokens_per_s", "memory_bytes", "loss")}), file=report, flush=True)
    return metrics
loop.Trainer.step = gated
from arriero.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Turns:
    """A command of a checkout in a process of its own, which does one step at a time when told."""

    def __init__(self, checkout: Path, command: list[str]) -> None:
        env = {**os.environ, "PYTHONPATH": str(checkout)}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *command],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        self.steps: list[dict[str, float]] = []
        self.running = self._until_ready()

    def _until_ready(self) -> bool:
        """Let it run until it waits for its next turn; false where it has ended instead."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                return True
            self.steps.append(json.loads(line))
        if self.process.wait():
            self.log.seek(0)
            raise SystemExit(f"{self.process.args}\n{self.log.read()[-4000:]}")
        return False

    def turn(self) -> None:
        """One step, and all that follows it: validation, a save."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.running = self._until_ready()


def prepare(data: Path) -> None:
    """The demo's pairs and shards of the standard library, by this checkout."""
    for done, command in (
        ("pairs/stats.json", "data build docstrings {0}/pairs --held-out 0.025"),
        ("corpus/manifest.json", "curate stdlib --out {0}/corpus"),
        ("tokenizer/tokenizer.json", "tokenizer train {0}/corpus --kind llama3 --vocab-size 4096 --out {0}/tokenizer"),
        ("shards/train/manifest.json", "shard {0}/corpus --tokenizer {0}/tokenizer --validation 0.05 --out {0}/shards"),
    ):
        if not (data / done).exists():
            subprocess.run([sys.executable, "-m", "arriero", *command.format(data).split()], cwd=HERE, check=True)


def train(before: Path, recipe: str, data: Path, rounds: int) -> dict[str, Any]:
    """Both checkouts on one recipe, `rounds` times from its beginning."""
    steps: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for turn in range(rounds):
        runs = {}
        for which, checkout in (("before", before), ("after", HERE)):
            out = data / which
            shutil.rmtree(out, ignore_errors=True)
            runs[which] = Turns(checkout, [*RECIPES[recipe].format(data=data).split(), "--out", str(out)])
        while runs["before"].running:
            order = ["before", "after"] if (turn + len(runs["before"].steps)) % 2 else ["after", "before"]
            for which in order:
                runs[which].turn()
        for which, run in runs.items():
            steps[which] += run.steps[COMPILING:]
    pairs = zip(steps["before"], steps["after"], strict=True)
    ratios = [after["tokens_per_s"] / before["tokens_per_s"] for before, after in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    best = {w: statistics.quantiles([s["tokens_per_s"] for s in done], n=4)[2] for w, done in steps.items()}
    memory = {which: max(step["memory_bytes"] for step in done) / 1e6 for which, done in steps.items()}
    return {
        "tokens_per_s": {w: round(statistics.median(s["tokens_per_s"] for s in done)) for w, done in steps.items()},
        "pairs": len(ratios),
        "ratio": round(middle, 3),
        "best": round(best["after"] / best["before"], 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "memory_mb": {which: round(value) for which, value in memory.items()},
        "memory_ratio": round(memory["after"] / memory["before"], 3),
        "last_loss": {which: done[-1]["loss"] for which, done in steps.items()},
    }


def decode(before: Path, rounds: int) -> dict[str, Any]:
    """Tokens/s of bench/decode.py, greedy, without transformers' compiled decode, in turns."""
    found: dict[str, list[float]] = {"before": [], "after": []}
    for turn in range(rounds):
        order = [("before", before), ("after", HERE)]
        for which, checkout in order if turn % 2 == 0 else reversed(order):
            command = [sys.executable, str(checkout / "bench" / "decode.py"), "--no-compiled", "--rounds", "3"]
            env = {**os.environ, "PYTHONPATH": str(checkout)}
            line = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            found[which].append(json.loads(line)["tokens_per_s"]["arriero"]["median"])
    ratio = statistics.median(found["after"]) / statistics.median(found["before"])
    return {"tokens_per_s": found, "ratio": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[*RECIPES, "decode"], choices=[*RECIPES, "decode"])
    parser.add_argument("--data", type=Path, default=Path("out/checkouts"), help="where data is made, once")
    args = parser.parse_args()
    if args.before is None:
        print(json.dumps({"bench": "checkouts", "left_out": "needs --before, another checkout to compare with"}))
        return
    args.data.mkdir(parents=True, exist_ok=True)
    prepare(args.data.resolve())
    before, result = args.before.resolve(), dict[str, Any](bench="checkouts", rounds=args.rounds)
    for name in args.only:
        run = decode(before, args.rounds) if name == "decode" else train(before, name, args.data.resolve(), args.rounds)
        result[name] = run
        print(name, run, file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
