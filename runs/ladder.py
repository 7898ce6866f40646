"""Rows, table and plot of runs/ladder.sh. minutes: of sampling and training; tokens/s: those sampled, over that time.

python runs/ladder.py row OUT ARM SEED    # adds a row to OUT/rows.jsonl, once
python runs/ladder.py table OUT           # prints the table, draws OUT/ladder.png
"""

import json
import sys
from pathlib import Path

import numpy as np

RESAMPLES = 2000


def results(out: Path, name: str) -> dict:
    """Values of an evaluation, empty where it was not made."""
    file = out / "eval" / name / "results.json"
    return {key: m["value"] for key, m in json.loads(file.read_text())["measures"].items()} if file.is_file() else {}


def scores(out: Path, name: str, measure: str) -> np.ndarray:
    """A measure of each held-out question, in their order."""
    lines = (out / "eval" / name / "samples.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["scores"][measure] for line in lines])


def trained(run: Path) -> dict:
    """Seconds of sampling and training, tokens that were sampled, and the last entropy, where they are known."""
    found: dict = {}
    if (took := run.with_name(run.name + ".seconds")).is_file():
        found["seconds"] = sum(map(int, took.read_text().split()))
    for file in sorted(run.rglob("metrics.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            found |= {key: record[key] for key in ("entropy",) if key in record}
    tokens = 0
    for file in [*run.glob("round-*/answers/*.jsonl"), *run.glob("rollouts/*.jsonl")]:
        for record in map(json.loads, file.read_text().splitlines()):
            tokens += record["tokens"] if "tokens" in record else sum(len(a["ids"]) for a in record.get("answers", ()))
    return found | ({"sampled_tokens": tokens} if tokens else {})


def divergence(out: Path, name: str) -> float:
    """KL divergence from the start, nats an answer: log p(answer) less that under the start, one answer a question."""
    import torch

    from arriero.checkpoint.load import load
    from arriero.checkpoint.source import resolve
    from arriero.data.prompts import read_prompts
    from arriero.infer.config import SamplingConfig
    from arriero.infer.engine import Engine
    from arriero.infer.request import Request

    model, tokenizer = load(resolve("smollm2-135m"), dtype=torch.float32)
    prompts = read_prompts(out / "task/test.jsonl", tokenizer, max_length=1024)
    engine = Engine(
        model.requires_grad_(False), tokenizer, max_running=64, context=max(len(p.ids) for p in prompts) + 25
    )
    for adapter in ("start", name):
        engine.load_adapter(adapter, out / adapter / "adapter")
    drawn = SamplingConfig(temperature=1.0, seed=0)
    answers = engine.generate([Request(p.ids, 24, drawn, logprobs=0, adapter=name) for p in prompts])
    asked, ours = [], []
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            end = [answer.stopped_by] if isinstance(answer.stopped_by, int) else []
            ids, at = [*prompt.ids, *answer.ids, *end], len(prompt.ids)
            asked.append(Request(ids, 0, prompt_logprobs=0, prompt_logprobs_from=at, adapter="start"))
            ours.append(sum(p.raw for p in answer.logprobs))
    theirs = [sum(p.raw for p in found.prompt_logprobs) for (found,) in engine.generate(asked)]
    return float(np.mean(ours) - np.mean(theirs))


def row(out: Path, arm: str, seed: str) -> None:
    """One arm of one seed."""
    name, file = f"{arm}-{seed}", out / "rows.jsonl"
    there = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if any((r["arm"], r["seed"]) == (arm, int(seed)) for r in there):
        return
    on_task, other, text = (results(out, name + suffix) for suffix in ("", "-other", "-text"))
    found = {"arm": arm, "seed": int(seed), **on_task, "other_pass@1": other["pass@1"]}
    found |= {"kl": divergence(out, name)} | ({"bits_per_byte": text["bits_per_byte"]} if text else {})
    with file.open("a") as opened:
        opened.write(json.dumps(found | trained(out / name)) + "\n")


def gain(out: Path, arm: str, seeds: list[int], measure: str) -> tuple[float, float, float]:
    """The mean gain over the start and its 95% interval: questions and seeds are drawn again, paired by question."""
    start = scores(out, "start", measure)
    gains = np.stack([scores(out, f"{arm}-{seed}", measure) - start for seed in seeds])  # [seeds, questions]
    rng = np.random.default_rng(0)
    drawn = [
        gains[rng.integers(0, len(seeds), len(seeds))][:, rng.integers(0, len(start), len(start))].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return gains.mean(), low, high


def table(out: Path) -> None:
    """All arms: the measures' means over seeds, and the gain in pass@1."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    start, other, text = (results(out, f"start{suffix}") for suffix in ("", "-other", "-text"))
    titles = f"{'gain in pass@1 (95%)':>28}{'in pass@8':>28}{'KL':>6}{'entropy':>9}"
    costs = f"{'other':>8}{'bits/byte':>11}{'minutes':>9}{'tokens/s':>10}"
    print(f"{'':12}{'seeds':>6}{'pass@1':>8}{'pass@8':>8}{'greedy':>8}{titles}{costs}")
    bits = f"{text['bits_per_byte']:11.3f}" if text else ""
    print(
        f"{'start':18}{start['pass@1']:8.1%}{start['pass@8']:8.1%}{start['greedy_reward']:8.1%}{'':71}"
        f"{other['pass@1']:8.1%}{bits}"
    )
    gains = {}
    for arm in dict.fromkeys(r["arm"] for r in rows):
        of = [r for r in rows if r["arm"] == arm]
        known = [key for key in of[0] if key != "arm" and all(key in r for r in of)]
        mean = {key: float(np.mean([r[key] for r in of])) for key in known}
        first, eight = (gain(out, arm, [r["seed"] for r in of], measure) for measure in ("pass@1", "pass@8"))
        gains[arm] = first
        shown = "".join("{:+.1%} ({:+.1%} to {:+.1%})".format(*found).rjust(28) for found in (first, eight))
        entropy = f"{mean['entropy']:9.2f}" if "entropy" in mean else " " * 9
        bits = f"{mean['bits_per_byte']:11.3f}" if "bits_per_byte" in mean else " " * 11
        time = f"{mean['seconds'] / 60:9.1f}" if "seconds" in mean else " " * 9
        speed = (
            f"{mean['sampled_tokens'] / mean['seconds']:10.0f}" if {"seconds", "sampled_tokens"} <= mean.keys() else ""
        )
        print(
            f"{arm:12}{len(of):6}{mean['pass@1']:8.1%}{mean['pass@8']:8.1%}{mean['greedy_reward']:8.1%}{shown}"
            f"{mean['kl']:6.2f}{entropy}{mean['other_pass@1']:8.1%}{bits}{time}{speed}"
        )
    plot(out, rows, start, gains)


def plot(out: Path, rows: list, start: dict, gains: dict) -> None:
    """pass@1 and pass@8 of every run, beside the start's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(gains)), dpi=160, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, measure in zip(axes, ("pass@1", "pass@8"), strict=True):
        for i, arm in enumerate(gains):
            values = [r[measure] for r in rows if r["arm"] == arm]
            ax.plot(values, [i] * len(values), "o", alpha=0.7)
        ax.axvline(start[measure], color="grey", linewidth=1, linestyle="--")
        ax.set_xlabel(f"{measure} (dashed: the start)")
        ax.set_xlim(0, 1)
    axes[0].set_yticks(range(len(gains)), list(gains))
    axes[0].set_ylim(len(gains) - 0.5, -0.5)
    figure.savefig(out / "ladder.png")


if __name__ == "__main__":
    {"row": row, "table": table}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
