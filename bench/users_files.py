"""Two checkouts of Arriero on users' files, by turns: rows tokenised, records read, a model loaded.

    git worktree add ../before f90e046
    python bench/users_files.py --before ../before [--rounds 7]

Each turn is a process of its own, which ends with an error where a module of Arriero comes from elsewhere than its
checkout (an editable installation lends what the older one lacks). All is CPU time of one thread, the median of a
turn's repetitions after one that warms the caches; files are made of Python's help topics.
Prints one JSON line: medians over the rounds, and of the ratios of neighbouring turns (after / before) the median, the
least and the largest. Rows and MB a second: above 1 is faster; CPU seconds of a load: below 1 is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
ROWS = 400  # conversations tokenised
LENGTHS = {"short": 600, "long": 32_000}  # bytes of a record
READ = 24_000_000  # bytes of a file of records
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def prepare(data: Path) -> None:
    """Conversations, and records of two lengths."""
    text = " ".join(" ".join(importlib.import_module("pydoc_data.topics").topics.values()).split())
    pieces = [text[start : start + 500] for start in range(0, ROWS * 1000, 500)]
    with open(data / "rows.jsonl", "w") as file:
        for question, answer in zip(pieces[::2], pieces[1::2], strict=True):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer + "."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    for name, length in LENGTHS.items():
        line = json.dumps({"text": text[:length]})[: length - 3] + '"}\n'
        (data / f"{name}.jsonl").write_text(line * (READ // len(line)))


def seconds(work: Callable[[], Any], repetitions: int) -> float:
    """CPU seconds of this process for `work`."""
    found = []
    for _ in range(repetitions + 1):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found[1:])


def turn(checkout: Path, data: Path) -> dict[str, float]:
    """What one checkout needs, in this process."""
    import torch

    from arriero.checkpoint.load import load_model
    from arriero.checkpoint.source import resolve
    from arriero.data import sft_cache
    from arriero.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    read: Any = vars(sft_cache)["read_records"]  # its module has changed
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    records = list(islice(read(data / "rows.jsonl"), ROWS))
    assert len(records) == ROWS
    found = {"rows_per_s": ROWS / seconds(lambda: sft_cache.encode_records(tokenizer, records), 5)}
    for name in LENGTHS:
        file = data / f"{name}.jsonl"
        size = file.stat().st_size / 1e6
        found[f"{name}_records_mb_per_s"] = size / seconds(lambda file=file: sum(1 for _ in read(file)), 7)
    found["load_cpu_s"] = seconds(lambda: load_model("smollm2-135m"), 3)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "arriero":
            assert Path(str(module.__file__)).is_relative_to(checkout), f"{name} comes from {module.__file__}"
    return found


def process(checkout: Path, data: Path) -> dict[str, float]:
    """A turn in a process of its own."""
    env = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--turn", str(checkout), "--data", str(data)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=data)
    if done.returncode:
        raise SystemExit(f"{checkout}:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(turn(args.turn, args.data)))
        return
    if args.before is None:
        print(json.dumps({"bench": "users_files", "left_out": "needs --before, another checkout to compare with"}))
        return
    turns: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work))
        for i in range(args.rounds):
            order = [("before", args.before.resolve()), ("after", HERE)]
            for which, checkout in order if i % 2 == 0 else reversed(order):
                turns[which].append(process(checkout, Path(work)))
                print(which, turns[which][-1], file=sys.stderr, flush=True)
    result: dict[str, Any] = {"bench": "users_files", "rounds": args.rounds}
    for name in turns["before"][0]:
        before, after = ([found[name] for found in turns[which]] for which in ("before", "after"))
        ratios = [new / old for old, new in zip(before, after, strict=True)]
        result[name] = {
            "before": round(statistics.median(before), 3),
            "after": round(statistics.median(after), 3),
            "ratio": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
