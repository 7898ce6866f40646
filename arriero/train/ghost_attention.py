"""Ghost attention's data (Llama 2, arXiv 2307.09288, section 3.3): behind `arriero data build gatt`.

A dialogue gets an instruction that is to hold throughout. It is joined to every message of the user while the answers
are sampled, turn by turn, each after the answers before it; and kept in the first message alone in the row that is
learned. The loss is 0 on every token of earlier turns, the assistant's included: those answers were sampled under an
instruction that stood right before them, and the row does not show it. Half of the time the instruction that is
learned is the short form, and one to `most` of different kinds are joined at random, as published (hobbies, language,
public figures there; the built-in ones here are such that a rule can tell whether an answer obeys, `obeys`).

Price: a generation of each turn; the instruction's tokens again at every turn.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.data.messages import text_of
from arriero.errors import DataError
from arriero.io.records import parse_row, read_records, source_files
from arriero.train.answering import Answering, Messages, drawn


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
    def long(self) -> str:
        """What is joined to every turn while sampling."""
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
        rng = random.Random(drawn(seed, "gatt", i))
        shuffled = rng.sample(list(instructions), len(instructions))
        kinds: dict[str, Instruction] = {}
        for instruction in shuffled:
            kinds.setdefault(instruction.kind, instruction)
        several = rng.randint(1, min(most, len(kinds)))
        found.append(Dialogue(turns, tuple(list(kinds.values())[:several]), rng.random() < 0.5, where))
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


def build_gatt(
    dialogues: Sequence[Dialogue], answering: Answering, obeyed: bool = False
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of the dialogues, their answers sampled under the instruction, and how many were left out and why.

    obeyed: leave out those with an answer of which a rule says that it does not obey.
    """
    talks: list[Messages] = [[] for _ in dialogues]
    dropped: dict[int, str] = {}
    for turn in range(max((len(d.turns) for d in dialogues), default=0)):
        asked = [i for i, d in enumerate(dialogues) if turn < len(d.turns) and i not in dropped]
        for i in asked:
            talks[i].append({"role": "user", "content": joined(dialogues[i].long, dialogues[i].turns[turn])})
        for i, answer in zip(asked, answering([talks[i] for i in asked], f"turn {turn}"), strict=True):
            talks[i].append({"role": "assistant", "content": answer.text.strip()})
            if not (answer.stopped and answer.text.strip()):
                dropped[i] = "with a cut or empty answer"
            elif obeyed and obeys(dialogues[i], answer.text.strip()) is False:
                dropped[i] = "with an answer that does not obey"
    rows = [row(d, talk) for i, (d, talk) in enumerate(zip(dialogues, talks, strict=True)) if i not in dropped]
    return rows, Counter(dropped.values())


def row(dialogue: Dialogue, sampled: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that is learned: the instruction in the first turn alone, the last answer alone trained."""
    messages: Messages = []
    for i, message in enumerate(sampled):
        if message["role"] == "user":
            text = dialogue.turns[i // 2]
            messages.append({"role": "user", "content": joined(dialogue.kept, text) if i == 0 else text})
        else:
            messages.append({**message, "train": i == len(sampled) - 1})
    meta = {"source": dialogue.where, "instructions": [i.long for i in dialogue.drawn], "shortened": dialogue.shortened}
    return {"messages": messages, "meta": meta}


def joined(instruction: str, text: str) -> str:
    """An instruction and what the user says, as one message."""
    return f"{instruction}\n\n{text}"


def obeys(dialogue: Dialogue, answer: str) -> bool | None:
    """Whether an answer obeys all instructions of a dialogue; None where no rule can tell."""
    rules = [i.obeyed for i in dialogue.drawn if i.obeyed is not None]
    return all(rule(answer) for rule in rules) if len(rules) == len(dialogue.drawn) else None
