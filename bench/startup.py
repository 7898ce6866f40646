"""How long `arriero --help` and `arriero sft --help` take, from process start to exit: medians of ten, in seconds.

The bound is 0.5 s; the interpreter's own start is given for comparison. The three alternate, so that a busy
moment of the machine falls on all of them.
"""

import json
import statistics
import subprocess
import sys
import time

RUNS = 10
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "help": [sys.executable, "-m", "arriero", "--help"],
    "sft_help": [sys.executable, "-m", "arriero", "sft", "--help"],
}


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    result: dict[str, object] = {"bench": "startup", "runs": RUNS}
    for name, values in times.items():
        result[f"{name}_s"] = round(statistics.median(values), 3)
        result[f"{name}_range_s"] = [round(min(values), 3), round(max(values), 3)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
