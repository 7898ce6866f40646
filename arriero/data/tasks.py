"""Tasks whose answers can be checked exactly, as prompts with the right answer beside each: for reinforcement learning.

Four generators of our own (`TASKS`) and a game of several turns (`GAMES`), as hard as `size` and `digits` make them,
and all of reasoning-gym's (extra "rl"), as `reasoning-gym:NAME`. A row has `prompt`, `answer` and `task`; one of
reasoning-gym's also `entry`, which its own scorer reads (reward "reasoning-gym"), and one of a game has what its
environment begins with in the answer's place.

Held-out questions differ by text, white space and case apart, from all training questions, and no question stands
twice. Seeds alone do not give that: reasoning-gym's instance i is drawn with seed + i, so neighbouring seeds share
nearly all instances, and the space of a small task is soon drawn twice over. So questions are drawn one after the
other, those seen before are dropped, and the overlap is counted in the written files.

Price: a million questions a minute of ours, ten to a hundred thousand of reasoning-gym's.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError, check, did_you_mean, require
from arriero.io.files import make_output, split_lines, write_json, write_jsonl

GYM = "reasoning-gym:"
PATIENCE = 2000  # drawings in a row without a new question, before the task is taken to have no more

WORDS = (
    *("llama", "mountain", "river", "basket", "yellow", "copper", "whistle", "garden", "lantern", "saddle", "winter"),
    *("harbour", "meadow", "orange", "thunder", "blanket", "village", "candle", "feather", "sugar", "willow", "pepper"),
    *("marble", "cotton", "bridge", "summer", "pebble", "rabbit", "kettle", "button"),
)
LEGS = {
    "llama": 4, "horse": 4, "dog": 4, "cat": 4, "cow": 4, "sheep": 4, "chicken": 2, "duck": 2, "ant": 6, "bee": 6,
    "beetle": 6, "spider": 8, "scorpion": 8, "snake": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Hardness:
    """size: terms of a sum, numbers to sort, words to count in, kinds of animals. digits: of each number."""

    size: int = 2
    digits: int = 1

    def __post_init__(self) -> None:
        check(1 <= self.size <= 12, f"size is {self.size}; it must be from 1 to 12")
        check(1 <= self.digits <= 9, f"digits is {self.digits}; it must be from 1 to 9")


Generator = Callable[[random.Random, Hardness], tuple[str, str]]


def chain_sum(rng: random.Random, hard: Hardness) -> tuple[str, str]:
    """A sum and difference of `size` numbers of `digits` digits."""
    terms = [_number(rng, hard.digits) for _ in range(hard.size)]
    signs = [rng.choice("+-") for _ in terms[1:]]
    text = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    value = terms[0] + sum(term if sign == "+" else -term for sign, term in zip(signs, terms[1:], strict=True))
    return f"Calculate {text}. Answer with the number only.", str(value)


def number_sorting(rng: random.Random, hard: Hardness) -> tuple[str, str]:
    """`size` different numbers of `digits` digits, to put in order."""
    lowest = 0 if hard.digits == 1 else 10 ** (hard.digits - 1)
    space = range(lowest, 10**hard.digits)
    check(hard.size <= len(space), f"size is {hard.size}; there are {len(space)} numbers of {hard.digits} digits")
    numbers = rng.sample(space, hard.size)
    order = rng.choice(("ascending", "descending"))
    listed = ", ".join(map(str, numbers))
    answer = ", ".join(map(str, sorted(numbers, reverse=order == "descending")))
    return f"Sort these numbers in {order} order: {listed}. Answer with the sorted list only.", answer


def letter_counting(rng: random.Random, hard: Hardness) -> tuple[str, str]:
    """How often a letter stands in `size` words."""
    words = [rng.choice(WORDS) for _ in range(hard.size)]
    letter = rng.choice(sorted(set("".join(words))))
    text = f'How many times does the letter "{letter}" appear in "{" ".join(words)}"? Answer with the number only.'
    return text, str("".join(words).count(letter))


def leg_counting(rng: random.Random, hard: Hardness) -> tuple[str, str]:
    """How many legs animals of `size` kinds have together, up to `digits` digits of each."""
    kinds = rng.sample(sorted(LEGS), hard.size)
    counts = [rng.randint(1, 10**hard.digits - 1) for _ in kinds]
    listed = ", ".join(f"{n} {_plural(kind) if n > 1 else kind}" for n, kind in zip(counts, kinds, strict=True))
    total = sum(n * LEGS[kind] for n, kind in zip(counts, kinds, strict=True))
    return f"How many legs do these animals have in total: {listed}? Answer with the number only.", str(total)


def guess_number(rng: random.Random, hard: Hardness) -> dict[str, Any]:
    """A range of 2^`size` - 1 numbers of `digits` digits, one of which `size` guesses always find: halve what is left.

    Which one is not in the row: the environment draws it.
    """
    numbers, lowest = 2**hard.size - 1, 1 if hard.digits == 1 else 10 ** (hard.digits - 1)
    most = 10**hard.digits - numbers
    check(lowest <= most, f"size is {hard.size}; {numbers:,} numbers of {hard.digits} digits are not there")
    low = rng.randint(lowest, most)
    high = low + numbers - 1
    text = (
        f"I am thinking of a number from {low} to {high}. Guess it in at most {hard.size} "
        f"{'try' if hard.size == 1 else 'tries'}. Answer with the number only."
    )
    return {"prompt": text, "low": low, "high": high, "tries": hard.size}


TASKS: dict[str, Generator] = {
    "chain-sum": chain_sum,
    "number-sorting": number_sorting,
    "letter-counting": letter_counting,
    "leg-counting": leg_counting,
}

GAMES: dict[str, Callable[[random.Random, Hardness], dict[str, Any]]] = {"guess-number": guess_number}
"""Tasks of several turns, for the environment of the same name, which gives the rewards: no row has an answer."""


def build_tasks(
    name: str,
    out: Path,
    *,
    train: int,
    held_out: int,
    seed: int,
    hard: Hardness,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write train.jsonl, test.jsonl and stats.json; returns what stats.json says.

    settings: of reasoning-gym's task. Raises `ConfigError` for a task that is not there, or that has too few questions.
    """
    check(train >= 1 and held_out >= 0, f"train is {train} and held_out {held_out}; at least 1 and 0 are needed")
    if name.startswith(GYM):
        drawn = _gym_rows(name.removeprefix(GYM), seed, settings)
    else:
        if name not in (names := [*TASKS, *GAMES]):
            known = ", ".join(names)
            raise ConfigError(f"{name!r} is no task; there are {known}, and {GYM}NAME{did_you_mean(name, names)}")
        check(not settings, f"settings {', '.join(settings)} are reasoning-gym's; {name} takes size and digits")
        drawn = _own_rows(name, seed, hard)
    rows, repeated = _different(drawn, train + held_out, name)
    make_output(out)
    parts = {"test": rows[:held_out], "train": rows[held_out:]}
    for part, members in parts.items():
        write_jsonl(out / f"{part}.jsonl", members)
    shared = overlap(out / "train.jsonl", out / "test.jsonl")
    stats = {
        "task": name, "seed": seed, "train": train, "held_out": held_out, "overlap": shared, "repeated": repeated,
        "longest_answer": max(len(row.get("answer", "")) for row in rows),
    }  # fmt: skip
    write_json(out / "stats.json", stats)
    return stats


def overlap(train: Path, test: Path) -> int:
    """Questions of one file that the other asks too, white space and case apart, as the files stand."""
    asked = [
        {question_key(json.loads(line)["prompt"]) for line in split_lines(path.read_text("utf-8")) if line}
        for path in (train, test)
    ]
    return len(asked[0] & asked[1])


def question_key(text: str) -> bytes:
    """Equal for questions that differ in white space and case alone (as `prompts.Prompt.digest`)."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()


def _different(drawn: Iterator[dict[str, Any]], wanted: int, name: str) -> tuple[list[dict[str, Any]], int]:
    """The first `wanted` rows that ask something new, and how many were dropped."""
    seen: set[bytes] = set()
    rows: list[dict[str, Any]] = []
    repeated = in_a_row = 0
    for row in drawn:
        if (key := question_key(row["prompt"])) in seen:
            repeated, in_a_row = repeated + 1, in_a_row + 1
            if in_a_row == PATIENCE:
                raise ConfigError(
                    f"{name} gives {len(rows):,} different questions of this kind, and {wanted:,} are wanted; make it "
                    "larger (--size, --digits, or --set for reasoning-gym), or ask for fewer"
                )
            continue
        seen.add(key)
        rows.append(row)
        in_a_row = 0
        if len(rows) == wanted:
            break
    return rows, repeated


def _own_rows(name: str, seed: int, hard: Hardness) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{name} {seed}")
    while True:
        if name in GAMES:
            yield {**GAMES[name](rng, hard), "task": name}
            continue
        question, answer = TASKS[name](rng, hard)
        yield {"prompt": question, "answer": answer, "task": name}


def _gym_rows(name: str, seed: int, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """reasoning-gym's questions, each with its entry as far as JSON holds it."""
    gym = require("reasoning_gym", "rl")
    known: Sequence[str] = list(require("reasoning_gym.factory", "rl").DATASETS)
    if name not in known:
        raise ConfigError(f"reasoning-gym has no task {name!r}{did_you_mean(name, known)}")
    size = 1 << 16
    for part in count():
        try:
            data = gym.create_dataset(name, size=size, seed=seed + part * size, **settings)
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"reasoning-gym's {name} refuses the settings {dict(settings)} ({error})") from error
        for i in range(size):
            entry = data[i]
            if entry["answer"] is not None:
                plain = json.loads(json.dumps(entry, default=str))
                yield {"prompt": entry["question"], "answer": str(entry["answer"]), "task": GYM + name, "entry": plain}


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _plural(kind: str) -> str:
    return kind if kind == "sheep" else kind + "s"
