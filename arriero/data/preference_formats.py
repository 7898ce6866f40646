"""Rows of preferences: answers to one prompt, and which of them is better.

Containers are those of `arriero.io.records`. Layouts are recognised row by row from the column names:

    pair        prompt + chosen + rejected; or chosen + rejected alone, as two whole dialogues that begin alike
    ranked      the same with edited, which is better than chosen (Llama 3, arXiv 2407.21783, section 4.1.2); or
                prompt + ranked, a list from best to worst
    scored      prompt + completions (or responses, answers) + scores (or rewards): two lists
    unpaired    prompt + completion (or response) + label: true for a good answer

`prompt` may also be `question`, `instruction` (with input or context), `messages` or `conversations`. Prompts and
answers are texts or messages; a dialogue may also be Anthropic's text ("\\n\\nHuman: ... \\n\\nAssistant: ...").
Beside them may stand system, tools, and

    rating      how much better chosen is, by Llama 2's four levels (arXiv 2307.09288, section 3.2.1): "significantly
                better", "better", "slightly better", "negligibly better" (also "unsure"), or 3, 2, 1, 0
    margin      the same as a number, at least 0
    chosen_safe, rejected_safe, edited_safe; of lists and unpaired answers safe: whether an answer is safe

As with conversations, every text of a row is used or the row is refused, and unused columns are named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from arriero.data.formats import (
    BESIDE_INSTRUCTION,
    SPOKEN,
    Conversation,
    columns_of,
    instruction_of,
    stands_in,
    unused_columns,
)
from arriero.data.messages import (
    SYSTEM,
    as_message,
    asked,
    check_links,
    checked_message,
    from_sharegpt,
    is_empty,
    list_cell,
    placed,
    present,
    side,
    system_of,
    text_of,
    tools_of,
    with_system,
)
from arriero.errors import DataError
from arriero.io.records import Record, RowDict, parse_row
from arriero.tokenizer.contents import MARKS, is_blank

Kind = Literal["pair", "ranked", "scored", "unpaired"]
Messages = list[dict[str, Any]]

KINDS: tuple[Kind, ...] = ("pair", "ranked", "scored", "unpaired")
RATINGS = ("significantly better", "better", "slightly better", "negligibly better")  # arXiv 2307.09288, 3.2.1
_RATINGS = {name: i for i, name in enumerate(RATINGS)} | {
    "significantly": 0,
    "slightly": 2,
    "negligible": 3,
    "negligibly": 3,
    "unsure": 3,
    "negligibly better / unsure": 3,
    **{str(level): 3 - level for level in range(4)},
}
ASKED = ("prompt", "question", "instruction", "messages", "conversations")
SIDES = ("edited", "chosen", "rejected")
LISTS = ("completions", "responses", "answers")
SCORES = ("scores", "rewards")
SINGLE = ("completion", "response")
LAYOUTS = (
    "'prompt' + 'chosen' + 'rejected', 'chosen' + 'rejected' (whole dialogues), 'prompt' + 'ranked', "
    "'prompt' + 'completions' + 'scores', 'prompt' + 'completion' + 'label'"
)
READ = frozenset([
    *[*ASKED, *BESIDE_INSTRUCTION, *SIDES, *LISTS, *SCORES, *SINGLE, *SYSTEM, "ranked", "label", "tools"],
    *["rating", "margin", "safe", *(f"{name}_safe" for name in SIDES)],
])  # fmt: skip
_TURN = re.compile(r"\s*\n\n(Human|Assistant):[ ]?")


@dataclass(frozen=True)
class Preference:
    """Answers to one prompt. values: higher is better; equal ones are not compared.

    Messages of the prompt are context. safe: 1 or 0 for each answer, -1 where nobody says. rating: how much better the
    chosen answer is, an index of RATINGS, or -1. margin: the same as a number, or nan.
    """

    kind: Kind
    prompt: Messages
    answers: tuple[Messages, ...]
    names: tuple[str, ...]  # of the answers, for messages: "chosen"
    values: tuple[float, ...]
    safe: tuple[int, ...]
    rating: int
    margin: float
    tools: list[dict[str, Any]] | None
    file: str
    row: int
    unused: frozenset[str]

    @property
    def where(self) -> str:
        """File and row, for error messages."""
        return f"row {self.row} of {self.file}"

    def conversation(self, i: int) -> Conversation:
        """The prompt with answer i."""
        return Conversation([*self.prompt, *self.answers[i]], self.tools, self.file, self.row, self.unused)


@dataclass(frozen=True)
class _Answers:
    """The answers of a row as its columns have them, named by their columns."""

    kind: Kind
    cells: dict[str, Any]
    values: tuple[float, ...]
    safe: tuple[int, ...]
    used: frozenset[str]


def is_preference(row: RowDict) -> bool:
    """Whether a row is in one of the layouts of preferences; a label has to be true or false."""
    return _kind_of(present(row)) is not None


def parse_preference(record: Record) -> Preference:
    """Parse one row; raises DataError where it is broken, has no known layout, or compares what cannot be compared."""
    row = parse_row(record)
    return placed(f"row {record.row} of {record.file}", lambda: _preference(present(row), record))


def _preference(row: RowDict, record: Record) -> Preference:
    found = _answers(row)
    unused: set[str] = set()
    prompt, answers, used = _prompt_and_answers(row, found)
    prompt = with_system(
        system_of(row), [_context(checked_message(m, i, unused), unused) for i, m in enumerate(prompt)]
    )
    checked = tuple(
        placed(f"{name!r}", lambda answer=answer: _answer(prompt, answer, unused))  # type: ignore[misc]
        for name, answer in zip(found.cells, answers, strict=True)
    )
    _check_differ(found, checked)
    all_messages = [*prompt, *(m for answer in checked for m in answer)]
    used = {*used, *found.used, *SYSTEM, *MARKS, "tools", "rating", "margin"}
    unused.update(unused_columns(row, used, all_messages, READ | SPOKEN, next(iter(found.cells)).split("[")[0]))
    return Preference(
        found.kind,
        prompt,
        checked,
        tuple(found.cells),
        found.values,
        found.safe,
        _rating(row),
        _margin(row),
        tools_of(row.get("tools")),
        record.file,
        record.row,
        frozenset(unused),
    )


# Layouts


def _kind_of(row: RowDict) -> Kind | None:
    if "chosen" in row and "rejected" in row:
        return "ranked" if not is_empty(row.get("edited")) else "pair"
    if "ranked" in row:
        return "ranked"
    if any(name in row for name in LISTS) and any(name in row for name in SCORES):
        return "scored"
    if isinstance(row.get("label"), bool) and any(name in row for name in SINGLE):
        return "unpaired"
    return None


def _answers(row: RowDict) -> _Answers:
    kind = _kind_of(row)
    if kind is None:
        hint = "; 'label' has to be true or false" if "label" in row else ""
        lacking = [name for name in ("chosen", "rejected") if name not in row]
        if len(lacking) == 1:
            hint += f"; {lacking[0]!r} is missing, or null here: fill it or drop the row"
        raise DataError(f"no preference in its columns ({columns_of(row)}); rename them to one of: {LAYOUTS}{hint}")
    if kind == "unpaired":
        name = next(name for name in SINGLE if name in row)
        safe = (_safe(row.get("safe"), "safe"),)
        return _Answers(kind, {name: row[name]}, (float(row["label"]),), safe, frozenset([name, "label", "safe"]))
    if "chosen" in row:
        names = [name for name in SIDES if not is_empty(row.get(name)) or name != "edited"]
        said = tuple(_safe(row.get(f"{name}_safe"), f"{name}_safe") for name in names)
        values = tuple(float(v) for v in reversed(range(len(names))))
        used = frozenset([*names, *(f"{name}_safe" for name in names)])
        return _Answers(kind, {name: row[name] for name in names}, values, said, used)
    return _listed(row, kind)


def _listed(row: RowDict, kind: Kind) -> _Answers:
    """Answers in a list: from best to worst, or with a score each."""
    name = "ranked" if kind == "ranked" else next(name for name in LISTS if name in row)
    answers = list_cell(row[name], name)
    used = [name, "safe"]
    if len(answers) < 2:
        raise DataError(
            f"{name!r} has {len(answers)} answers, and two at least can be compared; add some or drop the row"
        )
    values = [float(v) for v in reversed(range(len(answers)))]
    if kind == "scored":
        of = next(name for name in SCORES if name in row)
        used.append(of)
        values = [_number(value, of) for value in list_cell(row[of], of)]
        if len(values) != len(answers):
            raise DataError(f"{name!r} has {len(answers)} entries and {of!r} {len(values)}; give each answer one score")
    safe = [None] * len(answers) if is_empty(row.get("safe")) else list_cell(row["safe"], "safe")
    if len(safe) != len(answers):
        raise DataError(
            f"{name!r} has {len(answers)} entries and 'safe' {len(safe)}; say it of each answer, or of none"
        )
    cells = {f"{name}[{i}]": answer for i, answer in enumerate(answers)}
    return _Answers(kind, cells, tuple(values), tuple(_safe(s, "safe") for s in safe), frozenset(used))


# Prompts and answers


def _prompt_and_answers(row: RowDict, found: _Answers) -> tuple[list[Any], list[list[Any]], set[str]]:
    """Messages of the prompt and of each answer, not yet checked, and the columns of the prompt."""
    for name, cell in found.cells.items():
        if is_empty(cell):
            raise DataError(f"{name!r} is empty; write the answer or drop the row")
    sides = {name: _talk(cell, name) for name, cell in found.cells.items()}
    column, given = _given_prompt(row)
    used = {column} if column else set()
    if column == "instruction":
        used |= instruction_of(row, column)[1]
    whole = {n for n, talk in sides.items() if not isinstance(talk[0], dict) or talk[0].get("role") != "assistant"}
    if whole and len(whole) < len(sides):
        other = next(n for n in sides if n not in whole)
        raise DataError(
            f"{min(whole)!r} begins with another role than the assistant, as a whole dialogue, and {other!r} is an "
            "answer; write both in one way"
        )
    if not whole:
        if given is None:
            raise DataError(
                f"these answers have no prompt; add 'prompt', or write {' and '.join(map(repr, sides))} as whole "
                "dialogues (messages, or '\\n\\nHuman: ... \\n\\nAssistant: ...')"
            )
        return given, list(sides.values()), used
    common = _beginning(sides)
    if given is not None and not stands_in(_plain(given), [m for m in common if isinstance(m, dict)]):
        raise DataError(
            f"{column!r} is not in what {' and '.join(map(repr, sides))} begin with; answers to one prompt are "
            "compared: mend it, or take the column out"
        )
    return common, [talk[len(common) :] for talk in sides.values()], used


def _plain(messages: Sequence[Any]) -> list[Any]:
    return [{"content": text_of(m)} if isinstance(m, dict) else m for m in messages]


def _given_prompt(row: RowDict) -> tuple[str | None, list[Any] | None]:
    """The column of the prompt, and its messages; two Nones where there is none."""
    name = next((name for name in ASKED if name in row), None)
    if name is None:
        return None, None
    cell = asked(row[name], name)
    if name in ("messages", "conversations"):
        return name, [from_sharegpt(m, i) for i, m in enumerate(list_cell(cell, name))]
    if name == "instruction":
        return name, [as_message("user", instruction_of(row, name)[0])]
    if isinstance(cell, str) and (turns := _turns(cell)):
        if turns[-1]["role"] == "assistant" and is_blank(turns[-1]["content"]):  # it ends where the answer begins
            turns.pop()
        return name, turns
    return name, side("user", cell, name)


def _talk(cell: Any, name: str) -> list[Any]:
    """An answer or a dialogue as messages."""
    if isinstance(cell, dict):
        cell = [cell]
    if isinstance(cell, str) and (turns := _turns(cell)):
        return turns
    return [from_sharegpt(m, i) for i, m in enumerate(side("assistant", cell, name))]


def _turns(text: str) -> Messages:
    """The messages of a dialogue as Anthropic writes it; none where the text is none."""
    if not _TURN.match(text):
        return []
    _, *parts = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [as_message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _beginning(sides: dict[str, list[Any]]) -> list[Any]:
    """The messages that all dialogues begin with: the prompt."""
    talks = list(sides.values())
    common = [ms[0] for ms in takewhile(lambda ms: all(m == ms[0] for m in ms), zip(*talks, strict=False))]
    n = len(common)
    names = " and ".join(map(repr, sides))
    if any(len(talk) == n for talk in talks):
        if all(len(talk) == n for talk in talks):
            raise DataError(f"{names} are the same dialogue, so neither is better; drop the row")
        short = next(name for name, talk in sides.items() if len(talk) == n)
        raise DataError(
            f"{short!r} is the beginning of the other dialogue, so it has no answer to compare; drop the row"
        )
    for name, talk in sides.items():
        if not isinstance(talk[n], dict) or talk[n].get("role") != "assistant":
            raise DataError(
                f"{names} have different prompts: message {n} of {name!r} differs, and it is no answer; answers to one "
                "prompt are compared: give both the same messages before them, or drop the row"
            )
    return common


def _context(message: dict[str, Any], unused: set[str]) -> dict[str, Any]:
    """A message of a prompt: what it is answered with is learned, not what was said before."""
    if marks := [name for name in MARKS if name in message]:
        unused.update(f"{name!r} (in its prompt)" for name in marks)
    kept = {k: v for k, v in message.items() if k not in MARKS}
    return {**kept, "train": 0} if kept["role"] == "assistant" else kept


def _answer(prompt: Messages, answer: Sequence[Any], unused: set[str]) -> Messages:
    checked = [checked_message(m, len(prompt) + i, unused) for i, m in enumerate(answer)]
    for i, which in ((0, "first"), (-1, "last")):
        if checked[i]["role"] != "assistant":
            raise DataError(
                f"the {which} message of the answer is the {checked[i]['role']}'s; an answer begins and ends with the "
                "assistant's messages"
            )
    check_links([*prompt, *checked])
    return checked


def _check_differ(found: _Answers, answers: Sequence[Messages]) -> None:
    """Refuse answers that are the same and yet one is better."""
    names, seen = list(found.cells), dict[str, int]()
    for i, answer in enumerate(answers):
        first = seen.setdefault(repr([{**m, "content": text_of(m).strip()} for m in answer]), i)
        if found.values[first] != found.values[i]:
            raise DataError(f"{names[first]!r} and {names[i]!r} are one answer, so neither is better; drop one of them")


# Further columns


def _rating(row: RowDict) -> int:
    value = row.get("rating")
    if is_empty(value):
        return -1
    said = value if isinstance(value, str) else str(int(value)) if value in (0, 1, 2, 3) else repr(value)
    level = _RATINGS.get(" ".join(re.split(r"[\s_-]+", said.strip().lower())))
    if level is None or isinstance(value, bool):
        raise DataError(f"'rating' is {value!r}; give one of {', '.join(map(repr, RATINGS))}, or 3, 2, 1, 0")
    return level


def _margin(row: RowDict) -> float:
    value = row.get("margin")
    if is_empty(value):
        return math.nan
    margin = _number(value, "margin")
    if margin < 0:
        raise DataError(f"'margin' is {margin:g}, as if 'rejected' were better; swap the two, or give at least 0")
    return margin


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{name!r} holds {value!r}, which is no finite number; give one, or drop the row")
    return number


def _safe(value: Any, name: str) -> int:
    if value is None:
        return -1
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return int(value)
    raise DataError(f"{name!r} is {value!r}; give true (safe) or false")
