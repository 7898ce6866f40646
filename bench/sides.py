"""What benchmarks share that compare Arriero with a trainer that lives in another environment: sides in turn.

A side is the benchmark's own file, run by an interpreter with `--side NAME --precision TYPE`; its last line is JSON.
Each is a process of its own, one after the other: neither has the other's memory or threads. Not a benchmark itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Of this process, resident."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With what all such benchmarks are told; they add their own."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--peer", default="", help="an interpreter that has trl and peft; without it only our side runs")
    found.add_argument("--precisions", nargs="*", default=["bf16"], help="of our side, each measured")
    found.add_argument("--peer-precisions", nargs="+", default=["fp32"], help="of TRL's, of which the fastest counts")
    found.add_argument("--side", choices=("arriero", "trl"), help=argparse.SUPPRESS)
    found.add_argument("--precision", default="bf16", help=argparse.SUPPRESS)
    found.add_argument("--model", default="", help=argparse.SUPPRESS)
    return found


def run(name: str, file: str, args: argparse.Namespace, own: Sequence[str], ours: Callable, theirs: Callable) -> None:
    """Measure one side, where `args` names it, else all of them in turn, and print a line of JSON.

    own: the arguments that are the benchmark's. ours(args), theirs(args): a side's measures; `seconds` is compared.
    """
    if args.side:
        print(json.dumps(ours(args) if args.side == "arriero" else theirs(args)))
        return

    def side(python: str, which: str, precision: str, model: str = "") -> dict[str, Any]:
        told = [file, *own, "--side", which, "--precision", precision, "--model", model]
        done = subprocess.run([python, *told], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]

    report: dict[str, Any] = {"bench": name}
    for precision in args.precisions:
        report[f"arriero {precision}"] = side(sys.executable, "arriero", precision)
    if args.peer:
        from arriero.checkpoint.convert import convert

        with tempfile.TemporaryDirectory() as folder:
            model = str(Path(folder) / "model")
            convert("smollm2-135m", model, to="hf")
            for precision in args.peer_precisions:
                report[f"trl {precision}"] = side(args.peer, "trl", precision, model)
        best = min(report[f"trl {precision}"]["seconds"] for precision in args.peer_precisions)
        for precision in args.precisions:
            report[f"times faster, {precision}"] = round(best / report[f"arriero {precision}"]["seconds"], 2)
    print(json.dumps(report))
