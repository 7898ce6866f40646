"""How a run of rejection sampling did: a table of its rounds, and its report, from the files that they left."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from arriero.eval.bootstrap import Interval, difference, interval, mean
from arriero.eval.pass_at_k import is_right, pass_at_k
from arriero.io.files import split_lines, write_jsonl
from arriero.io.reading import read_json
from arriero.train.rejection_config import RejectionConfig
from arriero.train.report import write_report

RESAMPLES = 2000
SHOWN = 8  # held-out prompts whose answers are in the report, from round to round


def table(config: RejectionConfig, measured: bool) -> Table:
    """A row for the first model and one for each round, with 95% intervals; gains are paired by prompt.

    measured: whether there are held-out prompts.
    """
    k = config.validation_answers
    shown = Table(title=f"rejection sampling, {config.reward}")
    for name in ("after", "chosen", "mean reward", "greedy", "pass@1", f"pass@{k}", "pass@1 gained", "tokens"):
        shown.add_column(name, justify="left" if name == "after" else "right")
    first: list[float] = []
    for number in range(config.rounds + 1):
        directory = Path(config.out) / f"round-{number}"
        row = ["the model", "", ""]
        if number:
            told = read_json(directory / "round.json")
            row = [f"round {number}", f"{told['chosen']:,}", f"{told['mean_reward']:.3f}"]
        if measured:
            rows = read_rows(_held_out(config, number))
            right = [sum(map(is_right, r["sampled"])) for r in rows]
            passed = [pass_at_k(k, c, 1) for c in right]
            first = first or passed
            gained = difference(mean(first), mean(passed), RESAMPLES, 0)
            row += [
                f"{mean([float(is_right(r['greedy'])) for r in rows]).value:.1%}",
                _shown(interval(mean(passed), RESAMPLES, 0)),
                f"{mean([pass_at_k(k, c, k) for c in right]).value:.1%}",
                _shown(gained, "+") if number else "",
                f"{mean([r['tokens'] for r in rows]).value:.1f}",
            ]
        shown.add_row(*row)
    return shown


def write_rounds(config: RejectionConfig, done: int) -> Path:
    """Write the report of the run after so many rounds: reward on held-out prompts, and samples, by round.

    metrics.jsonl has a validation event for each round, as that of a run of steps has.
    """
    events = []
    for number in range(done + 1):
        rows = read_rows(_held_out(config, number))
        values = [value for row in rows for value in row["sampled"]]
        reward = fmean(values)
        told = {"event": "validation", "step": number, "loss": -reward, "reward": reward}
        greedy = fmean(row["greedy"] for row in rows)
        shown = [f"{row['prompt']}\n→ {row['answer']}  [reward {row['greedy']:g}]" for row in rows[:SHOWN]]
        events.append({**told, "greedy": greedy, "samples": shown})
    write_jsonl(Path(config.out) / "metrics.jsonl", events)
    return write_report(Path(config.out))


def _held_out(config: RejectionConfig, number: int) -> Path:
    """What the model said to held-out prompts after a round; before the first, 0."""
    directory = Path(config.out)
    return directory / f"round-{number}" / "held_out.jsonl" if number else directory / "held_out-0.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines that a run wrote."""
    return [json.loads(line) for line in split_lines(path.read_text("utf-8")) if line]


def _shown(found: Interval, sign: str = "") -> str:
    bounds = "" if found.low is None else f" ({found.low:{sign}.1%} to {found.high:{sign}.1%})"
    return f"{found.value:{sign}.1%}{bounds}"
