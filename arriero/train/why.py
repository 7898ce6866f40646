"""Where a row that a run made comes from: prompt, round or step, weights, and what scored it.

Two kinds of file are known: what a run on its own answers journals (RUN/rollouts/step-00000012-0.jsonl), and what
rejection sampling chose (RUN/round-2/chosen.jsonl). Settings that the row does not repeat are those of RUN/config.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.checkpoint import native
from arriero.errors import DataError
from arriero.io.records import parse_row, read_records
from arriero.train.episodes import Sampled


def why(file: Path, number: int) -> list[tuple[str, str]]:
    """(what, value) of row `number` of `file`, from 1; raises `DataError` where no run made that row."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; name one of RUN/rollouts/ or RUN/round-N/chosen.jsonl")
    record = next((r for r in read_records(file) if r.row == number), None)
    if record is None:
        raise DataError(f"{file} has no row {number}; rows count from 1")
    row = parse_row(record)
    run = next((p for p in file.resolve().parents if (p / "config.toml").exists() and _is_run(p)), None)
    config = tomllib.loads((run / "config.toml").read_text("utf-8")) if run else {}
    if "asked" in row and "weights" in row:
        return [*_rollout(row, run), *_settings({**config, "reward": row.get("reward")})]
    if isinstance(row.get("meta"), dict) and "reward" in row["meta"]:
        return [*_chosen(row), *_settings(config)]
    raise DataError(
        f"row {number} of {file} was made by no run that says so; known are RUN/rollouts/*.jsonl and "
        "RUN/round-N/chosen.jsonl"
    )


def _is_run(directory: Path) -> bool:
    """Whether answers of a run lie here: a training below it has a config.toml of its own."""
    return (directory / "rollouts").is_dir() or any(directory.glob("round-*"))


def _rollout(row: dict[str, Any], run: Path | None) -> Iterator[tuple[str, str]]:
    asked, weights = row["asked"], row["weights"]
    yield "prompt", f"row {asked['row']} of {asked['file']}: {asked['text']}"
    yield "step", f"{row['step']}, sampled with seeds {row['seed']} to {row['seed'] + len(row['answers']) - 1}"
    after = weights["step"]
    yield "weights", "those that the run began with" if after == 0 else f"after step {after}"
    if run is not None and (saved := [s for s in native.steps(run) if s <= after]):
        exact = "" if saved[-1] == after else f", {after - saved[-1]} steps before; a resumed run repeats them exactly"
        yield "checkpoint", f"{native.path_of(run, saved[-1])}{exact}"
    yield "checksum", str(weights["checksum"])
    for k, answer in enumerate(row["answers"]):
        sampled = Sampled.of(answer)
        value = "not scored" if sampled.value is None else f"{sampled.value:g} ({sampled.outcome})"
        yield f"answer {k}", f"{value}{f', {sampled.note}' if sampled.note else ''}: {sampled.shown}"


def _chosen(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    meta = row["meta"]
    yield "prompt", str(meta.get("prompt", ""))
    yield "answer", str(row.get("completion", ""))
    for name in ("round", "temperature", "reward"):
        if name in meta:
            yield name, f"{meta[name]}"
    round_ = meta.get("round", 1)
    yield "weights", "those that the run began with" if round_ == 1 else f"after round {round_ - 1}"


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    names = {"model": "model", "adapter": "adapter", "reward": "scored by", "recipe": "recipe"}
    yield from ((shown, str(config[name])) for name, shown in names.items() if config.get(name))
