"""How long a user waits before anything happens: `arriero --help`, `arriero sft --help`, and loading a model.

Medians of ten fresh processes, in seconds, the three taking turns so that a busy moment falls on all. The bounds are
0.5 s for help and 2 s for loading SmolLM2-135M (bf16, with its tokenizer) from a directory in Hugging Face's layout,
counted from after torch's own import, which is given too.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 10
LOAD = """
import sys, time
start = time.perf_counter()
import torch
imported = time.perf_counter()
from arriero.checkpoint.load import load
load(sys.argv[1])
print(imported - start, time.perf_counter() - imported)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "model"
        arriero = [sys.executable, "-m", "arriero"]
        convert = [*arriero, "convert", "smollm2-135m", str(directory), "--to", "hf", "--dtype", "bf16"]
        subprocess.run(convert, check=True, capture_output=True)
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "help": [*arriero, "--help"],
            "sft_help": [*arriero, "sft", "--help"],
        }
        times: dict[str, list[float]] = {name: [] for name in (*commands, "import_torch", "load")}
        for _ in range(RUNS):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - start)
            done = subprocess.run([sys.executable, "-c", LOAD, directory], check=True, capture_output=True, text=True)
            for name, value in zip(("import_torch", "load"), map(float, done.stdout.split()), strict=True):
                times[name].append(value)
    result: dict[str, object] = {"bench": "startup", "runs": RUNS}
    for name, values in times.items():
        result[f"{name}_s"] = round(statistics.median(values), 3)
        result[f"{name}_range_s"] = [round(min(values), 3), round(max(values), 3)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
