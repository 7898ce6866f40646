"""The report of a run: loss.png, and a self-contained report.html.

The files of a run directory:

    config.toml        the settings, seed included; `arriero run config.toml` repeats the run
    environment.json   versions, commit, hardware, command line (train/environment.py)
    data.json          files, fingerprints, lengths and mask statistics
    metrics.jsonl      a line per logged step and per event (train/metrics.py)
    checkpoints/       step-00000020/ ...: what a resume needs (checkpoint/native.py)
    round-1/ ...       of rejection sampling: answers, rows that were chosen, the fine-tuning run (train/rejection.py)
    reward.json        of a reward model: what held-out pairs say of it (train/reward_report.py)
    samples.jsonl      {"prompt", "reference", "before", "after"} per line
    adapter/ or model/ the result, in PEFT's or Hugging Face's layout
    loss.png, report.html

Any part may be missing: the report of an interrupted run shows what there is.
"""

from __future__ import annotations

import base64
import math
import statistics
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from arriero.checkpoint import native
from arriero.errors import CheckpointError
from arriero.io.files import write_text
from arriero.io.reading import read_json
from arriero.show.page import DARK, LIGHT, Theme, dress, png, template
from arriero.train import reward_report
from arriero.train.metrics import duration, surviving_records

SMOOTHING = 0.8  # weight of a step in the mean at its neighbour


def write_report(run_dir: Path) -> Path:
    """Write loss.png and report.html into `run_dir` from the files there; returns the path of report.html."""
    records = surviving_records(run_dir / "metrics.jsonl")
    steps = [record for record in records if "event" not in record]
    validation = [record for record in records if record.get("event") == "validation" and record["loss"] is not None]
    config_text = _text(run_dir / "config.toml")
    config = tomllib.loads(config_text)
    curves = {}
    if steps or validation:
        across = "round" if config.get("recipe") == "rejection" else "optimizer step"
        themes = (("light", LIGHT), ("dark", DARK))
        curves = {name: curves_png(steps, validation, theme, across) for name, theme in themes}
        (run_dir / "loss.png").write_bytes(curves["light"])
    page = template("arriero.train", "report.html").render(
        title=_title(config, run_dir),
        summary=_summary(steps, validation, run_dir),
        tiles=_tiles(steps, validation),
        curves={name: base64.b64encode(png).decode() for name, png in curves.items()},
        figures=reward_report.figures(run_dir),
        samples=surviving_records(run_dir / "samples.jsonl"),
        continuations=_continuations(records, config.get("prompts")),
        data=_rows(_json(run_dir / "data.json")),
        config=config_text,
        environment=_rows(_json(run_dir / "environment.json")),
        checkpoints=_checkpoints(run_dir, validation),
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


# -- curves ------------------------------------------------------------------------------------------------------


def curves_png(
    steps: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    theme: Theme = LIGHT,
    across: str = "optimizer step",
) -> bytes:
    """Draw training loss (each step, and smoothed), validation loss, and below them the learning rate of the steps.

    Where held-out answers are scored by another reward than those of the steps (`proxy`), that has axes of its own.
    """
    by_proxy = bool(steps and validation) and all("proxy" in record for record in validation)
    figure = Figure(figsize=(9, 5.4 + 2.4 * by_proxy), dpi=160, facecolor=theme.background, layout="constrained")
    if by_proxy:
        top, judged, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3.4, 2.4, 1])
    elif steps:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        judged = top
    else:
        top = bottom = judged = figure.subplots()
    x, shown = [record["step"] for record in steps], _shown_of(steps, validation)
    losses = [math.nan if record[shown] is None else record[shown] for record in steps]
    if steps:
        top.plot(x, losses, color=theme.first, alpha=0.3, linewidth=1)
        top.plot(x, smoothed(losses), color=theme.first, linewidth=2, label="training, smoothed")
        bottom.plot(x, [record["lr"] for record in steps], color=theme.text, linewidth=1.5)
    if validation:
        of_steps = [record["step"] for record in validation]
        marked: Any = {"color": theme.second, "linewidth": 2, "marker": "o", "markersize": 4.5}
        if by_proxy:
            proxy = [record["proxy"] for record in validation]
            top.plot(of_steps, proxy, **marked, linestyle="--", label="validation, by the same reward")
            judged.set_ylabel("validation reward", color=theme.text)
        judged.plot(of_steps, [record[shown] for record in validation], **marked, label="validation")
        best = min(validation, key=lambda record: record["loss"])
        judged.annotate(
            f"{best[shown]:.3f}",
            (best["step"], best[shown]),
            xytext=(0, -15),
            textcoords="offset points",
            ha="center",
            color=theme.second,
            fontweight="bold",
        )
        judged.margins(y=0.12)
    top.set_ylabel("mean reward" if shown == "reward" else "loss (nats per token)", color=theme.text)
    if steps:
        bottom.set_ylabel("learning rate", color=theme.text)
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        bottom.yaxis.get_offset_text().set_color(theme.text)
    bottom.set_xlabel(across, color=theme.text)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(tuple(dict.fromkeys((top, judged, bottom))), theme)
    top.legend(frameon=False, labelcolor=theme.text, loc="upper right")
    return png(figure)


def _shown_of(steps: list[dict[str, Any]], validation: list[dict[str, Any]]) -> str:
    """What a run is judged by: its loss, or where answers earn a reward, that."""
    records = steps or validation
    return "reward" if records and all("reward" in record for record in records) else "loss"


def smoothed(values: list[float]) -> list[float]:
    """Mean over neighbours on both sides, s_t = sum_i w^|t-i| v_i / sum_i w^|t-i| with w = 0.8, over finite v_i.

    Unlike the running mean on the screen, which knows only the past, it does not lag behind a falling loss.
    """
    forward, backward = _decayed(values), _decayed(values[::-1])[::-1]
    out = []
    for value, (sum_before, weight_before), (sum_after, weight_after) in zip(values, forward, backward, strict=True):
        own, one = (value, 1.0) if math.isfinite(value) else (0.0, 0.0)  # counted on both sides
        weight = weight_before + weight_after - one
        out.append((sum_before + sum_after - own) / weight if weight > 0 else math.nan)
    return out


def _decayed(values: list[float]) -> list[tuple[float, float]]:
    """For each t the sum over i <= t of w^(t-i) v_i, and of w^(t-i)."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = SMOOTHING * total, SMOOTHING * weight
        if math.isfinite(value):
            total, weight = total + value, weight + 1
        out.append((total, weight))
    return out


# -- text --------------------------------------------------------------------------------------------------------


def _title(config: dict[str, Any], run_dir: Path) -> str:
    if "model" not in config:
        return run_dir.resolve().name
    data = Path(config.get("data", {}).get("train", "")).name
    return f"{Path(config['model']).name}, {config.get('recipe', 'run')}" + (f" on {data}" if data else "")


def _summary(steps: list[dict[str, Any]], validation: list[dict[str, Any]], run_dir: Path) -> str:
    if not steps and validation and _shown_of([], validation) == "reward":  # rounds, each of which is a run of its own
        best = max(validation, key=lambda record: record["reward"])
        return f"Held-out reward from {validation[0]['reward']:.3f} to {best['reward']:.3f} after round {best['step']}."
    if not steps:
        return "No step has been logged."
    last, total, shown = steps[-1], _total_steps(run_dir), _shown_of(steps, validation)
    stopped = f"Stopped at step {last['step']:,} of {total:,}" if total and last["step"] < total else ""
    text = stopped or f"{last['step']:,} steps"
    text += f" over {last['trained_tokens']:,} trained tokens ({last['tokens']:,} read)"
    if len(validation) > 1:
        best = min(validation, key=lambda record: record["loss"])
        text += f": validation {shown} from {validation[0][shown]:.3f} to {best[shown]:.3f} at step {best['step']:,}"
    elif last["loss"] is not None:
        text += f": training {shown} {last[shown]:.3f} at the last step"
    return text + "."


def _total_steps(run_dir: Path) -> int | None:
    """The planned number of steps, from the newest checkpoint."""
    known = [_json(native.path_of(run_dir, step) / "state.json").get("total_steps") for step in native.steps(run_dir)]
    return known[-1] if known else None


def _tiles(steps: list[dict[str, Any]], validation: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few numbers to see first: (name, value)."""
    tiles = []
    if validation:
        best = min(validation, key=lambda record: record["loss"])
        shown = _shown_of(steps, validation)
        tiles.append((f"best validation {shown}", f"{best[shown]:.3f}"))
        if best.get("bits_per_byte") is not None:
            tiles.append(("bits per byte", f"{best['bits_per_byte']:.3f}"))
    if steps:
        last = steps[-1]
        tiles += [
            ("steps", f"{last['step']:,}"),
            ("training time", duration(last["seconds"])),
            ("tokens/s", f"{last['tokens'] / last['seconds']:,.0f}"),
            ("peak memory", size(last["memory_bytes"])),
        ]
        if "mfu" in last:
            tiles.append(("model-FLOP use", f"{statistics.median(record['mfu'] for record in steps):.0%}"))
        if last["skipped"]:
            tiles.append(("steps skipped", f"{last['skipped']:,}"))
    return tiles


def _continuations(records: list[dict[str, Any]], prompts: Sequence[str] | None) -> list[list[tuple[int, str]]]:
    """For each prompt of a pretraining run the model's continuations, as (step, text), at up to four validations.

    prompts: the current ones, which may have changed on resume; None where the settings are lost.
    """
    sampled = [record for record in records if record.get("event") == "validation" and record.get("samples")]
    if not sampled:
        return []
    asked = [""] * len(sampled[-1]["samples"]) if prompts is None else prompts
    texts_of: list[list[tuple[int, str]]] = [[] for _ in asked]
    for record in sampled:
        texts = record["samples"]
        in_order = len(texts) == len(asked) and all(map(str.startswith, texts, asked))
        for i, prompt in enumerate(asked):
            answers = texts[i : i + 1] if in_order else [text for text in texts if text.startswith(prompt)]
            texts_of[i] += [(record["step"], text) for text in answers[:1]]
    return [_four(texts) for texts in texts_of if texts]


def _four(texts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first and the last, and two between them."""
    last = len(texts) - 1
    return [texts[i] for i in sorted({round(last * share) for share in (0, 1 / 3, 2 / 3, 1)})]


def _checkpoints(run_dir: Path, validation: list[dict[str, Any]]) -> list[dict[str, str]]:
    losses = {record["step"]: record["loss"] for record in validation}
    best = min(losses, key=lambda step: losses[step], default=None)
    return [
        {
            "step": f"{step:,}",
            "loss": f"{losses[step]:.4f}" if step in losses else "",
            "size": size(native.size_of(run_dir, step)),
            "best": "best" if step == best else "",
        }
        for step in native.steps(run_dir)
    ]


def size(count: int) -> str:
    """Return bytes with a unit: 512 bytes, 3.4 MB, 1.20 GB."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:,} bytes"


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """A JSON object as rows of a table."""
    return [
        (name.removesuffix("_bytes").replace("_", " "), _shown(value, name))
        for name, value in values.items()
        if value not in (None, [])
    ]


def _shown(value: Any, name: str = "") -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return size(value) if name.endswith("_bytes") else f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- files -------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one when the file is missing or was cut short by a kill."""
    try:
        return read_json(path, missing={})
    except CheckpointError:
        return {}
