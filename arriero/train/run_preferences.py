"""Preference rows made of the scored answers that a run left: what `arriero data build preferences` does.

A run of rejection sampling or of reinforcement learning has answered each prompt many times, with rewards. For each
prompt whose finished answers differ in reward, a row pairs one of the best with one of the worst: `prompt`, `chosen`,
`rejected`, and both rewards. `arriero reward` and `arriero dpo` take the rows as they are.

Price: the journals are read once, and the different answers of all prompts lie in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from arriero import settings
from arriero.checkpoint.load import load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.data.prompts import Prompts, read_split
from arriero.errors import ConfigError, DataError
from arriero.io.files import write_jsonl
from arriero.io.reading import read_json
from arriero.show.terminal import notes
from arriero.train.metrics import surviving_records
from arriero.train.recipes import RECIPES


@dataclass(frozen=True)
class Counts:
    """What became of the prompts: rows written, prompts whose answers all had one reward, and those never answered."""

    rows: int
    alike: int
    unanswered: int


def preferences_of_run(
    run: Path, out: Path, *, per_prompt: int = 1, seed: int = 0, console: Console | None = None
) -> Counts:
    """Write at most `per_prompt` rows for each prompt of the run in `run`, in the order of its prompts.

    Best answers are paired with worst ones, then the next best with the next worst while their rewards differ; equal
    rewards are ordered by a hash of `seed` and text, so neither length nor age is favoured.
    Raises a `UserError` where the directory holds no answers, or its data is no longer what it was.
    """
    if per_prompt < 1:
        raise ConfigError(f"per_prompt is {per_prompt}; it must be at least 1")
    prompts = _prompts(run, console or notes())
    values: dict[int, dict[str, float]] = defaultdict(dict)
    for prompt, text, value in _answers(run):
        values[prompt][text] = max(value, values[prompt].get(text, value))  # of a scorer that draws lots: its best
    if not values:
        raise DataError(f"{run}: no finished answers are recorded there; name a run of rejection, grpo or ppo")
    rows, alike = [], 0
    for i in sorted(values):
        pairs = _pairs(values[i], per_prompt, seed)
        alike += not pairs
        rows += [
            {"prompt": prompts[i].messages, "chosen": good, "rejected": bad,
             "meta": {"prompt": prompts[i].where, "run": str(run), "rewards": [values[i][good], values[i][bad]]}}
            for good, bad in pairs
        ]  # fmt: skip
    if not rows:
        raise DataError(
            f"{run}: to none of {len(values):,} prompts do two answers differ in reward, so nothing is preferred; take "
            "more answers, a higher temperature, or prompts of middle difficulty"
        )
    write_jsonl(out, rows)
    return Counts(len(rows), alike, len(prompts) - len(values))


def _pairs(values: Mapping[str, float], most: int, seed: int) -> list[tuple[str, str]]:
    """(better, worse) answers to one prompt."""

    def draw(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    ranked = sorted(values, key=lambda text: (-values[text], draw(text)))
    half = range(min(most, len(ranked) // 2))
    return [(ranked[i], ranked[-1 - i]) for i in half if values[ranked[i]] > values[ranked[-1 - i]]]


def _answers(run: Path) -> Iterator[tuple[int, str, float]]:
    """Prompt, text and reward of each finished and scored answer."""
    for path in sorted(run.glob("round-*/answers/*.jsonl")):  # of rejection: a row for each answer
        for row in surviving_records(path):
            yield from _counted(row["prompt"], row)
    for path in sorted(run.glob("rollouts/*.jsonl")):  # of reinforcement learning: a row for each prompt
        for row in surviving_records(path):
            for answer in row["answers"]:
                yield from _counted(row["prompt"], answer)


def _counted(prompt: int, answer: Mapping[str, Any]) -> Iterator[tuple[int, str, float]]:
    if answer["finished"] and answer["outcome"] == "scored":
        yield prompt, answer["text"], float(answer["value"])


def _prompts(run: Path, console: Console) -> Prompts:
    """The prompts that the answers are to, if the data is still what it was."""
    if not (run / "config.toml").is_file():
        raise DataError(f"{run}: no run here (no config.toml); name the run directory of rejection, grpo or ppo")
    _, config = settings.load_recipe(RECIPES, run / "config.toml")
    data = config.data
    if not hasattr(data, "max_prompt"):
        raise DataError(f"{run}: this run learned from rows, it sampled no answers; name one of rejection, grpo or ppo")
    tokenizer = load_tokenizer_at(
        resolve(config.model), adapter=config.adapter or None, chat_template=config.chat_template
    )
    prompts, _ = read_split(
        data.train, data.validation, tokenizer, max_length=data.max_prompt, max_truncated=data.max_truncated,
        raw=getattr(data, "raw", False), console=console,
    )  # fmt: skip
    known = read_json(run / "data.json").get("fingerprints", {})
    if prompts.fingerprint not in known.values():
        raise DataError(
            f"{run}: its prompts were others ({json.dumps(list(known))} of data.json differ from {data.train} as it is "
            "now); put the data back as it was"
        )
    return prompts
