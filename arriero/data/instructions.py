"""Dialogues with an instruction that is to hold throughout: what ghost attention learns from, and is measured on.

Ghost attention (Llama 2, arXiv 2307.09288, section 3.3) wants instructions given in the first turn to be obeyed in all
that follow. One to `most` instructions of different kinds are drawn for a dialogue. The built-in ones are such that a
rule can tell whether an answer obeys (`obeys`); published were hobbies, languages and public figures.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.data.formats import parse_prompt, parse_record
from arriero.data.messages import text_of
from arriero.errors import DataError
from arriero.io.records import parse_row, read_records, source_files

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Instruction:
    """What is to hold in every answer, in full and in short. kind: of one kind at most one is drawn."""

    kind: str
    long: str
    short: str
    obeyed: Callable[[str], bool] | None = None
    """Whether an answer obeys, where a rule can tell."""


def _word(word: str) -> Instruction:
    return Instruction(
        "word", f'End every answer of yours with the word "{word}", whatever I ask.', f'Always end with "{word}".',
        lambda text: re.sub(r"\W+$", "", text).casefold().endswith(word),
    )  # fmt: skip


def _start(word: str) -> Instruction:
    return Instruction(
        "start", f'Begin every answer of yours with the word "{word}", whatever I ask.', f'Always begin with "{word}".',
        lambda text: re.sub(r"^\W+", "", text).casefold().startswith(word),
    )  # fmt: skip


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$)", text.strip()))


BUILT_IN = (
    *map(_word, ("amigo", "llama", "indeed", "friend")),
    *map(_start, ("well", "hello", "surely")),
    Instruction("case", "Write all of your answers in capital letters.", "Always use capitals.", str.isupper),
    Instruction("length", "Answer everything in one sentence.", "One sentence.", lambda text: _sentences(text) <= 1),
)  # fmt: skip


@dataclass(frozen=True)
class Dialogue:
    """The messages of a user, in order, with the instructions drawn for them, and where they stand."""

    turns: tuple[str, ...]
    drawn: tuple[Instruction, ...]
    shortened: bool
    where: str

    @property
    def instruction(self) -> str:
        """In full: what is joined to every turn while sampling."""
        return " ".join(instruction.long for instruction in self.drawn)

    @property
    def kept(self) -> str:
        """What stands in the first turn of the row that is learned."""
        return " ".join(i.short if self.shortened else i.long for i in self.drawn)


def draw(
    dialogues: Sequence[tuple[Messages, str]], instructions: Sequence[Instruction], most: int, seed: int
) -> list[Dialogue]:
    """Instructions for each dialogue (messages, and where they stand): 1 to `most` of different kinds.

    Raises `DataError` for a dialogue without a message of the user.
    """
    found = []
    for i, (messages, where) in enumerate(dialogues):
        turns = tuple(text_of(message) for message in messages if message["role"] == "user")
        if len(turns) < len([message for message in messages if message["role"] != "assistant"]):
            raise DataError(
                f"{where}: it has messages of a system or a tool, which ghost attention has no place for; give "
                "the user's and the assistant's alone"
            )
        if not turns:
            raise DataError(f"{where}: it has no message of the user, to which an instruction could be joined")
        rng = random.Random(f"{seed} instructions {i}")
        shuffled = rng.sample(list(instructions), len(instructions))
        kinds: dict[str, Instruction] = {}
        for instruction in shuffled:
            kinds.setdefault(instruction.kind, instruction)
        several = rng.randint(1, min(most, len(kinds)))
        found.append(Dialogue(turns, tuple(list(kinds.values())[:several]), rng.random() < 0.5, where))
    return found


def read_dialogues(source: str | Path) -> list[tuple[Messages, str]]:
    """Conversations of a file, each with where it stands; the last message may be the user's or an answer."""
    found: list[tuple[Messages, str]] = []
    for path in source_files(source):
        for record in read_records(path):
            messages = parse_row(record).get("messages")
            asks = isinstance(messages, list) and messages and isinstance(messages[-1], dict)
            if asks and messages[-1].get("role") == "user":  # type: ignore[index]
                found.append((parse_prompt(record)[0], f"row {record.row} of {record.file}"))
            else:
                conversation = parse_record(record)
                found.append((conversation.messages, conversation.where))
    return found


def read_instructions(source: str) -> list[Instruction]:
    """Instructions of a file of rows `long`, and where they are there `short` and `kind`; raises `DataError`."""
    found = []
    for path in source_files(source):
        for record in read_records(path):
            given = parse_row(record)
            long, short = given.get("long"), given.get("short")
            if not isinstance(long, str) or not long.strip() or not isinstance(short, str | None):
                raise DataError(
                    f"row {record.row} of {record.file}: no instruction in a column 'long' (with 'short', a text too)"
                )
            found.append(Instruction(str(given.get("kind") or long), long, short or long))
    return found


def joined(instruction: str, text: str) -> str:
    """An instruction and what the user says, as one message."""
    return f"{instruction}\n\n{text}"


def obeys(dialogue: Dialogue, answer: str) -> bool | None:
    """Whether an answer obeys all instructions of a dialogue; None where no rule can tell."""
    rules = [i.obeyed for i in dialogue.drawn if i.obeyed is not None]
    return all(rule(answer) for rule in rules) if len(rules) == len(dialogue.drawn) else None
