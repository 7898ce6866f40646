"""Data files of any common layout, streamed as conversations.

Containers are those of `arriero.io.records`. Layouts are recognised row by row from the column names:

    OpenAI       messages: [{role, content, tool_calls?}]
    ShareGPT     conversations: [{from, value}]
    Alpaca       instruction, input?, output; Dolly: instruction, context?, response
    pair         prompt + completion | prompt + response | prompt + answer | question + answer; texts or messages

each with system? and tools?, the last two with history? ([question, answer] pairs) too. Every text of a row is used, or
the row is refused with the column's name; columns that hold no text of a conversation are reported once a file. None,
NaN, empty texts and empty lists count as absent; 0 does not.

Rows are read one at a time (only a .json array is read whole). Reading rows and parsing them are separate functions, so
that one process can read while many parse. Every error names the file, the row (for JSONL its line) and the remedy.

Price: about 55 microseconds a row of four messages, a twentieth of what tokenising it costs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.data.messages import (
    EMPTY_JSON,
    SYSTEM,
    as_context,
    as_message,
    asked,
    check_links,
    checked_message,
    differs_in_case,
    from_sharegpt,
    is_empty,
    list_cell,
    placed,
    present,
    side,
    system_of,
    text_cell,
    text_of,
    tools_of,
    with_system,
)
from arriero.errors import DataError
from arriero.io.records import Record, RowDict, parse_row
from arriero.show.terminal import warn_once
from arriero.tokenizer.contents import MARKS, REASONING, is_blank, mark_of

TALKS = ("messages", "conversations")
INSTRUCTED = (("instruction", "output"), ("instruction", "response"))
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("question", "answer"))
BESIDE_INSTRUCTION = ("input", "context")
LAYOUTS = (
    "'messages' (OpenAI), 'conversations' (ShareGPT), 'instruction' + 'output' (Alpaca), 'instruction' + 'response', "
    "'prompt' + 'completion', 'prompt' + 'response', 'prompt' + 'answer', 'question' + 'answer'"
)
READ = frozenset([*TALKS, *SYSTEM, *BESIDE_INSTRUCTION, "tools", "history", *MARKS, *sum((*INSTRUCTED, *PAIRS), ())])
# Columns that a conversation's text, or what belongs to it, may stand in: never passed over in silence.
SPOKEN = READ | {
    *REASONING,
    *["functions", "function_call", "tool_calls", "choices", "options", "documents", "chat_template_kwargs"],
    *["rationale", "cot", "chain_of_thought", "suffix", "instructions", "preamble"],
    *["image", "images", "audio", "audios", "video", "videos"],
}
PROVENANCE = "meta"  # an object that says where a row comes from, as our own builders write it: nothing to learn
SHOWN = 20  # names of unused columns in a warning


@dataclass(frozen=True)
class Conversation:
    """One example: OpenAI messages that end with the assistant's, the tools it may call, and its file and row."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    file: str
    row: int  # from 1; for JSONL the line
    unused: frozenset[str] = field(default=frozenset(), compare=False)  # what of the row is not in it, as shown

    @property
    def where(self) -> str:
        """File and row, for error messages."""
        return f"row {self.row} of {self.file}"


def parse_records(records: Iterable[Record]) -> Iterator[Conversation]:
    """Parse rows one after the other; at the end, warn of columns that were not used."""
    unused: dict[str, set[str]] = {}
    for record in records:
        conversation = parse_record(record)
        unused.setdefault(record.file, set()).update(conversation.unused)
        yield conversation
    for file, names in unused.items():
        warn_of_unused(file, names)


def warn_of_unused(file: str | Path, names: Iterable[str]) -> None:
    """Say once which columns of a file no conversation holds."""
    known = sorted(names)
    if known:
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        warn_once(f"columns {', '.join(known[:SHOWN])}{more} of {file} are not used")


# Layouts


def parse_record(record: Record) -> Conversation:
    """Parse one row; raises DataError where it is broken, has no known layout, or holds text that is not read."""
    row = parse_row(record)
    there = present(row)
    absent = [name for name in row if name not in there]
    return placed(f"row {record.row} of {record.file}", lambda: _conversation(there, absent, record))


def parse_prompt(record: Record) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
    """A row that waits for an answer: its messages, its tools, and all of its other columns, for whoever scores one.

    What is asked is in `prompt` (a text, or messages), `question`, or `messages`, and does not end with the
    assistant's message; `system`, `history` and `tools` belong to it as in `parse_record`.
    Raises DataError where the row is broken or nothing in it is asked.
    """
    row = present(parse_row(record))
    return placed(f"row {record.row} of {record.file}", lambda: _prompt(row))


def _prompt(row: RowDict) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
    given = [name for name in (*TALKS, "prompt", "question", "instruction") if name in row and not is_empty(row[name])]
    if not given:
        near = f"; did you mean {', '.join(hints)}?" if (hints := _near_prompt(row)) else ""
        raise DataError(f"no prompt in its columns ({columns_of(row)}); name it 'prompt', a text or messages{near}")
    name = given[0]
    if (
        len(given) > 1
        and name in TALKS
        and not stands_in(row[given[1]], [{"content": text} for text in _said(row[name])])
    ):
        raise DataError(f"{' and '.join(map(repr, given))} all say what is asked; keep one")
    talk = list_cell(row[name], name) if name in TALKS else side("user", row[name], name)
    used = {name, "tools", "history", *SYSTEM}
    messages = [
        checked_message(from_sharegpt(m, i), i, set()) for i, m in enumerate(_history(row.get("history")) + talk)
    ]
    if not messages or messages[-1]["role"] in ("assistant", "system", "developer"):
        whose = f"ends with the {messages[-1]['role']}'s message" if messages else "has no message"
        raise DataError(
            f"{name!r} {whose}, and an answer follows the user's or a tool's; take that message out, and keep a known "
            "answer in a column of its own, such as 'answer'"
        )
    messages = with_system(system_of(row), messages)
    return messages, tools_of(row.get("tools")), {key: value for key, value in row.items() if key not in used}


def columns_of(row: RowDict) -> str:
    """The names of a row's columns, for a message."""
    return ", ".join(repr(name) for name in list(row)[:SHOWN]) or "none"


def _near_prompt(row: RowDict) -> list[str]:
    return [f"'prompt' by {name!r}" for name in row if differs_in_case(name, ("prompt", "question", "messages"))]


def _said(talk: Any) -> list[str]:
    return [str(m.get("content", "")) for m in talk if isinstance(m, dict)] if isinstance(talk, list) else []


def _conversation(row: RowDict, absent: list[str], record: Record) -> Conversation:
    talk, used = _layout(row, absent)
    unused: set[str] = set()
    messages = [checked_message(message, i, unused) for i, message in enumerate(talk)]
    if not messages:
        raise DataError("the conversation is empty; drop the row")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the last message is the {messages[-1]['role']}'s, so there is no answer to it to learn; "
            "add the assistant's answer or drop that message"
        )
    check_links(messages)
    messages = with_system(system_of(row), messages)
    if mark_of({k: v for k, v in row.items() if not is_empty(v)}) is False:
        raise DataError("nothing to learn: the row itself is marked not to be trained; drop the row")
    beside = next(key for key in (*TALKS, *(ask for ask, _ in (*INSTRUCTED, *PAIRS))) if key in used)
    unused.update(unused_columns(row, used, messages, READ, beside))
    return Conversation(messages, tools_of(row.get("tools")), record.file, record.row, frozenset(unused))


def _layout(row: RowDict, absent: list[str]) -> tuple[list[Any], set[str]]:
    """The row's messages, not yet checked and without the system's, and the columns that they come from.

    absent: columns that are null or NaN in this row.
    """
    if "chosen" in row or "rejected" in row:
        raise DataError(
            "'chosen' and 'rejected' are preferences, and fine-tuning learns one answer; keep the one to learn as "
            "'completion' (beside 'prompt') or in 'messages', and remove both columns; `arriero dpo` and `arriero "
            "reward` learn from both"
        )
    used = {"tools", *SYSTEM, *MARKS}
    for name in TALKS:
        if name in row:
            return [from_sharegpt(m, i) for i, m in enumerate(list_cell(row[name], name))], used | {name}
    used.add("history")
    for ask, answer in INSTRUCTED:
        if ask in row and answer in row:
            talk, columns = _instruction(row, ask, answer)
            return _history(row.get("history")) + talk, used | columns
    for ask, answer in PAIRS:
        if ask in row and answer in row:
            return _history(row.get("history")) + _pair(row, ask, answer), used | {ask, answer}
    raise _no_layout(row, absent)


def _instruction(row: RowDict, ask: str, answer: str) -> tuple[list[Any], set[str]]:
    """Question and answer of a row in Alpaca's or Dolly's layout, and the columns that they come from."""
    prompt, columns = instruction_of(row, ask)
    talk = [as_message("user", asked(prompt, ask)), as_message("assistant", text_cell(row[answer], answer))]
    return talk, {answer, *columns}


def instruction_of(row: RowDict, ask: str) -> tuple[str, set[str]]:
    """An instruction with what it is about, as Alpaca and Dolly have them, and the columns that this comes from."""
    beside = [name for name in BESIDE_INSTRUCTION if not is_empty(row.get(name))][:1]
    parts = [text_cell(row[name], name) for name in (ask, *beside)]
    return "\n\n".join(part for part in parts if not is_blank(part)), {ask, *beside}


def _pair(row: RowDict, ask: str, answer: str) -> list[Any]:
    """The messages of a pair of a prompt and an answer, each a text or messages."""
    if isinstance(row.get("label"), bool):
        raise DataError(
            "'label' says whether the answer is good, which fine-tuning does not learn; keep the good answers "
            "and remove the column"
        )
    prompt = [as_context(m) for m in side("user", asked(row[ask], ask), ask)]
    return prompt + side("assistant", row[answer], answer)


def _no_layout(row: RowDict, absent: list[str]) -> DataError:
    near = [f"{known!r} by {name!r}" for name in list(row)[:SHOWN] if (known := _nearest(name))]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    if empty := [name for name in absent if name in READ]:
        hint += (
            f"; {' and '.join(map(repr, empty))} {'is' if len(empty) == 1 else 'are'} null or NaN here: drop the row"
        )
    if len(row) == 1 and (separator := next((c for c in ";\t|" if c in next(iter(row))), None)):
        hint += f"; columns are divided by ',' in a .csv, by a tab in a .tsv, and here by {separator!r}"
    if "text" in row:
        hint += "; a 'text' alone is for pretraining: arriero shard"
    return DataError(f"no known layout in its columns ({columns_of(row)}); rename them to one of: {LAYOUTS}{hint}")


def _nearest(name: str) -> str | None:
    """The known column that a name was perhaps meant to be."""
    if known := differs_in_case(name, READ):
        return known
    return next(iter(difflib.get_close_matches(name.lower(), READ - {name}, n=1, cutoff=0.85)), None)


def unused_columns(
    row: RowDict, used: Set[str], messages: list[dict[str, Any]], known: Set[str], beside: str
) -> Iterator[str]:
    """The columns that are not used, as they are shown; raises DataError for one that may hold text of the talk.

    known: all columns that are read in such rows. beside: one that is used here, for the message.
    """
    for name in row.keys() - used:
        value = row[name]
        if is_empty(value) or (name in SPOKEN and isinstance(value, str) and value.strip() in EMPTY_JSON):
            continue
        if name == PROVENANCE and isinstance(value, dict):
            continue
        if meant := differs_in_case(name, known):
            raise DataError(f"the column {name!r} is not known; did you mean {meant!r}?")
        if name == "functions":
            raise DataError(
                "'functions' is the older form of tools; rename it to 'tools', each entry as "
                "{type: function, function: {name, description, parameters}}"
            )
        if name in SPOKEN and not stands_in(value, messages):
            raise DataError(
                f"{name!r} stands beside {beside!r}, and would be lost; put what it says into the conversation, or "
                "remove the column"
            )
        yield repr(name)


def stands_in(value: Any, messages: list[dict[str, Any]]) -> bool:
    """Whether a column repeats text of the conversation, as the prompt in many data sets."""
    texts: list[Any] = [value] if isinstance(value, str) else []
    if isinstance(value, list):
        texts = [m.get("content", 0) if isinstance(m, dict) else 0 for m in value]
    contents = [text_of(message) for message in messages]
    return bool(texts) and all(isinstance(t, str) and any(t.strip() in c for c in contents) for t in texts)


# Cells


def _history(value: Any) -> list[Any]:
    """Earlier turns, [[question, answer], ...]; their answers are learned as any other, as LLaMA-Factory does."""
    if is_empty(value):
        return []
    turns = list_cell(value, "history")
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise DataError("'history' is no list of [question, answer] pairs; make it one, or use 'messages'")
    texts = [text_cell(text, "history") for turn in turns for text in turn]
    return [as_message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
