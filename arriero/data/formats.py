"""Data files of any common layout, streamed as conversations.

Containers are those of `arriero.io.records`. Layouts are recognised row by row from the column names:

    OpenAI       messages: [{role, content, tool_calls?}]
    ShareGPT     conversations: [{from, value}]
    Alpaca       instruction, input?, output; Dolly: instruction, context?, response
    pair         prompt + completion | prompt + response | question + answer; texts or messages

each with system? and tools?, the last two with history? ([question, answer] pairs) too. Every text of a row is used, or
the row is refused with the column's name; columns that hold no text of a conversation are reported once a file. None,
NaN, empty texts and empty lists count as absent; 0 does not.

Rows are read one at a time (only a .json array is read whole). Reading rows and parsing them are separate functions, so
that one process can read while many parse. Every error names the file, the row (for JSONL its line) and the remedy.

Price: about 55 microseconds a row of four messages, a twentieth of what tokenising it costs.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from arriero.errors import DataError, did_you_mean
from arriero.io.records import Record, RowDict, parse_json, parse_row
from arriero.show.terminal import warn_once
from arriero.tokenizer.contents import (
    MARKS,
    REASONING,
    UNCLEAR_MARKS,
    function_name,
    is_blank,
    is_trained,
    mark_of,
    part_texts,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
TALKS = ("messages", "conversations")
INSTRUCTED = (("instruction", "output"), ("instruction", "response"))
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
SYSTEM = ("system", "system_prompt", "system_message")
BESIDE_INSTRUCTION = ("input", "context")
LAYOUTS = (
    "'messages' (OpenAI), 'conversations' (ShareGPT), 'instruction' + 'output' (Alpaca), 'instruction' + 'response', "
    "'prompt' + 'completion', 'prompt' + 'response', 'question' + 'answer'"
)
READ = frozenset([*TALKS, *SYSTEM, *BESIDE_INSTRUCTION, "tools", "history", *MARKS, *sum((*INSTRUCTED, *PAIRS), ())])
# Columns that a conversation's text, or what belongs to it, may stand in: never passed over in silence.
SPOKEN = READ | {
    *REASONING,
    *["functions", "function_call", "tool_calls", "choices", "options", "documents", "chat_template_kwargs"],
    *["rationale", "cot", "chain_of_thought", "suffix", "instructions", "preamble"],
    *["image", "images", "audio", "audios", "video", "videos"],
}
TEXTS = frozenset(["name", *REASONING])  # members of a message that are texts
MEMBERS = frozenset(["role", "content", "tool_calls", "tool_call_id", *TEXTS, *MARKS])
# Members of messages that say where a message came from.
PROVENANCE = frozenset(
    [
        *["id", "message_id", "parent_id", "turn_id", "turn_identifier", "uuid", "index", "hash", "hashed_ip", "url"],
        *["timestamp", "created", "created_at", "date", "time", "model", "source", "lang", "language", "country"],
    ]
)
# A list of parts as JSON or Python prints it.
PRINTED_PARTS = re.compile(
    r"""\s*\[\s*\{\s*(['"])(type\1\s*:\s*\1text\1\s*,\s*\1text|text\1\s*:.*\1type)\1\s*:""", re.S
)
EMPTY_JSON = ("[]", "{}", "null")  # a cell of a list, as tables write that there is none
SHOWN = 20  # names of unused columns in a warning
T = TypeVar("T")


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


def text_of(message: dict[str, Any]) -> str:
    """A message's content, whether one text, a list of text parts, or none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# Layouts


def parse_record(record: Record) -> Conversation:
    """Parse one row; raises DataError where it is broken, has no known layout, or holds text that is not read."""
    row = parse_row(record)
    present = _present(row)
    absent = [name for name in row if name not in present]
    return _at(f"row {record.row} of {record.file}", lambda: _conversation(present, absent, record))


def parse_prompt(record: Record) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
    """A row that waits for an answer: its messages, its tools, and all of its other columns, for whoever scores one.

    What is asked is in `prompt` (a text, or messages), `question`, or `messages`, and does not end with the
    assistant's message; `system`, `history` and `tools` belong to it as in `parse_record`.
    Raises DataError where the row is broken or nothing in it is asked.
    """
    row = _present(parse_row(record))
    return _at(f"row {record.row} of {record.file}", lambda: _prompt(row))


def _prompt(row: RowDict) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
    given = [name for name in (*TALKS, "prompt", "question", "instruction") if name in row and not _is_empty(row[name])]
    if not given:
        near = f"; did you mean {', '.join(hints)}?" if (hints := _near_prompt(row)) else ""
        columns = ", ".join(repr(name) for name in list(row)[:SHOWN]) or "none"
        raise DataError(f"no prompt in its columns ({columns}); name it 'prompt', a text or messages{near}")
    name = given[0]
    if (
        len(given) > 1
        and name in TALKS
        and not _stands_in(row[given[1]], [{"content": text} for text in _said(row[name])])
    ):
        raise DataError(f"{' and '.join(map(repr, given))} all say what is asked; keep one")
    talk = _list(row[name], name) if name in TALKS else _side("user", row[name], name)
    used = {name, "tools", "history", *SYSTEM}
    messages = [_message(_from_sharegpt(m, i), i, set()) for i, m in enumerate(_history(row.get("history")) + talk)]
    if not messages or messages[-1]["role"] in ("assistant", "system", "developer"):
        whose = f"ends with the {messages[-1]['role']}'s message" if messages else "has no message"
        raise DataError(
            f"{name!r} {whose}, and an answer follows the user's or a tool's; take that message out, and keep a known "
            "answer in a column of its own, such as 'answer'"
        )
    messages = _with_system(_system(row), messages)
    return messages, _tools(row.get("tools")), {key: value for key, value in row.items() if key not in used}


def _near_prompt(row: RowDict) -> list[str]:
    return [f"'prompt' by {name!r}" for name in row if _differs_in_case(name, ("prompt", "question", "messages"))]


def _said(talk: Any) -> list[str]:
    return [str(m.get("content", "")) for m in talk if isinstance(m, dict)] if isinstance(talk, list) else []


def _at(where: str, read: Callable[[], T]) -> T:
    """What `read` returns; its refusal gets the place before it."""
    try:
        return read()
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _present(row: dict[str, T]) -> dict[str, T]:
    """What is there: without None, and without the NaN that tables hold in an empty cell."""
    return {k: v for k, v in row.items() if v is not None and v == v}


def _conversation(row: RowDict, absent: list[str], record: Record) -> Conversation:
    talk, used = _layout(row, absent)
    unused: set[str] = set()
    messages = [_message(message, i, unused) for i, message in enumerate(talk)]
    if not messages:
        raise DataError("the conversation is empty; drop the row")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the last message is the {messages[-1]['role']}'s, so there is no answer to it to learn; "
            "add the assistant's answer or drop that message"
        )
    _check_links(messages)
    messages = _with_system(_system(row), messages)
    if mark_of({k: v for k, v in row.items() if not _is_empty(v)}) is False:
        raise DataError("nothing to learn: the row itself is marked not to be trained; drop the row")
    unused.update(_unused(row, used, messages))
    return Conversation(messages, _tools(row.get("tools")), record.file, record.row, frozenset(unused))


def _layout(row: RowDict, absent: list[str]) -> tuple[list[Any], set[str]]:
    """The row's messages, not yet checked and without the system's, and the columns that they come from.

    absent: columns that are null or NaN in this row.
    """
    if "chosen" in row or "rejected" in row:
        raise DataError(
            "'chosen' and 'rejected' are preferences, and fine-tuning learns one answer; keep the one to learn as "
            "'completion' (beside 'prompt') or in 'messages', and remove both columns"
        )
    used = {"tools", *SYSTEM, *MARKS}
    for name in TALKS:
        if name in row:
            return [_from_sharegpt(m, i) for i, m in enumerate(_list(row[name], name))], used | {name}
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
    beside = [name for name in BESIDE_INSTRUCTION if name in row and not _is_empty(row[name])][:1]
    parts = [_text(row[name], name) for name in (ask, *beside)]
    prompt = "\n\n".join(part for part in parts if not is_blank(part))
    talk = [_as_message("user", _asked(prompt, ask)), _as_message("assistant", _text(row[answer], answer))]
    return talk, {ask, answer, *beside}


def _pair(row: RowDict, ask: str, answer: str) -> list[Any]:
    """The messages of a pair of a prompt and an answer, each a text or messages."""
    if isinstance(row.get("label"), bool):
        raise DataError(
            "'label' says whether the answer is good, which fine-tuning does not learn; keep the good answers "
            "and remove the column"
        )
    asked = [_given(m) for m in _side("user", _asked(row[ask], ask), ask)]
    return asked + _side("assistant", row[answer], answer)


def _given(message: Any) -> Any:
    """A message of a prompt: an answer in it is context, as in TRL, unless it is marked."""
    if not isinstance(message, dict) or message.get("role") != "assistant" or mark_of(_present(message)) is not None:
        return message
    return {**message, "train": 0}


def _asked(prompt: Any, name: str) -> Any:
    """`prompt` itself, unless there is nothing in it to answer."""
    if _is_empty(prompt):
        raise DataError(f"{name!r} is empty, so there is nothing to answer; fill it or drop the row")
    return prompt


def _no_layout(row: RowDict, absent: list[str]) -> DataError:
    columns = ", ".join(repr(name) for name in list(row)[:SHOWN]) or "none"
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
    return DataError(f"no known layout in its columns ({columns}); rename them to one of: {LAYOUTS}{hint}")


def _nearest(name: str) -> str | None:
    """The known column that a name was perhaps meant to be."""
    if known := _differs_in_case(name, READ):
        return known
    return next(iter(difflib.get_close_matches(name.lower(), READ - {name}, n=1, cutoff=0.85)), None)


def _unused(row: RowDict, used: set[str], messages: list[dict[str, Any]]) -> Iterator[str]:
    """The columns that are not used, as they are shown; raises DataError for one that may hold text of the talk."""
    for name in row.keys() - used:
        value = row[name]
        if _is_empty(value) or (name in SPOKEN and isinstance(value, str) and value.strip() in EMPTY_JSON):
            continue
        if known := _differs_in_case(name, READ):
            raise DataError(f"the column {name!r} is not known; did you mean {known!r}?")
        if name == "functions":
            raise DataError(
                "'functions' is the older form of tools; rename it to 'tools', each entry as "
                "{type: function, function: {name, description, parameters}}"
            )
        if name in SPOKEN and not _stands_in(value, messages):
            beside = next(key for key in (*TALKS, *(ask for ask, _ in (*INSTRUCTED, *PAIRS))) if key in used)
            raise DataError(
                f"{name!r} stands beside {beside!r}, and would be lost; put what it says into the conversation, or "
                "remove the column"
            )
        yield repr(name)


def _differs_in_case(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one is but for case, white space and quotes; None where there is none, or it is one."""
    if name in known:
        return None
    plain = name.strip("\ufeff\"' \t\r\n").lower()
    return plain if plain in known else None


def _is_empty(value: Any) -> bool:
    """Whether a cell is empty; 0 and false are not."""
    return is_blank(value) if isinstance(value, str) else value is None or value in ([], {}, b"")


def _stands_in(value: Any, messages: list[dict[str, Any]]) -> bool:
    """Whether a column repeats text of the conversation, as the prompt in many data sets."""
    texts: list[Any] = [value] if isinstance(value, str) else []
    if isinstance(value, list):
        texts = [m.get("content", 0) if isinstance(m, dict) else 0 for m in value]
    contents = [text_of(message) for message in messages]
    return bool(texts) and all(isinstance(t, str) and any(t.strip() in c for c in contents) for t in texts)


# Cells


def _text(value: Any, name: str) -> str:
    """A cell as text; a number, as tables make of digits, as it is written."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise DataError(f"{name!r} is {str(value).lower()}; write the word that it stands for, as a text")
    try:
        if isinstance(value, int | float | Decimal) and math.isfinite(value):
            return str(value)
    except (OverflowError, ValueError) as error:  # a whole number of hundreds, or thousands, of digits
        raise DataError(f"{name!r} is a number too long to be one; write it as a text") from error
    raise DataError(f"{name!r} is of type {type(value).__name__} ({repr(value)[:40]}); make it a text")


def _list(value: Any, name: str) -> list[Any]:
    """A list, or the list in a text of JSON: how CSV and some Parquet files carry them."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError) as error:
            python = "; it looks as Python prints a list: write it by json.dumps" if "{'" in value else ""
            raise DataError(f"{name!r} is a text that is not JSON ({error}); make it a list{python}") from error
    if not isinstance(value, list):
        raise DataError(f"{name!r} is of type {type(value).__name__}; make it a list")
    return value


def _as_message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _side(role: str, value: Any, name: str) -> list[Any]:
    """One side of a prompt/completion pair: messages as they are or as JSON text, or a text as one message."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            parsed = parse_json(value)
        except (ValueError, RecursionError):
            parsed = []
        if parsed and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in parsed):
            return parsed
    return value if isinstance(value, list) else [_as_message(role, _text(value, name))]


def _history(value: Any) -> list[Any]:
    """Earlier turns, [[question, answer], ...]; their answers are learned as any other, as LLaMA-Factory does."""
    if _is_empty(value):
        return []
    turns = _list(value, "history")
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise DataError("'history' is no list of [question, answer] pairs; make it one, or use 'messages'")
    texts = [_text(text, "history") for turn in turns for text in turn]
    return [_as_message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def _system(row: RowDict) -> str | None:
    given = {name: _text(row[name], name) for name in SYSTEM if name in row and not _is_empty(row[name])}
    if len(set(given.values())) > 1:
        raise DataError(f"{' and '.join(map(repr, given))} differ; keep one")
    return next(iter(given.values()), None)


def _with_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind the row's system text; refused where they begin with another one."""
    if system is None:
        return messages
    if messages[0]["role"] not in ("system", "developer"):
        return [_as_message("system", system), *messages]
    if text_of(messages[0]).strip() != system.strip():
        raise DataError(f"'system' stands beside a first message of role {messages[0]['role']!r}; keep one of the two")
    return messages


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools, each with a name; None where there are none."""
    if _is_empty(value) or (isinstance(value, str) and value.strip() in EMPTY_JSON):
        return None
    tools = _list(value, "tools")
    for i, tool in enumerate(tools):
        if not function_name(tool):
            raise DataError(
                f"tool {i} has no name; write it as {{type: function, function: {{name, description, parameters}}}}"
            )
    return tools


# Messages


def _from_sharegpt(message: Any, i: int) -> Any:
    """{from, value} as {role, content}; anything else stays for the checks to refuse."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    for ours, theirs in (("role", "from"), ("content", "value")):
        if message.get(ours) is not None and message.get(theirs) is not None:
            raise DataError(f"message {i} has both {theirs!r} and {ours!r}; keep one")
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    role = message["from"]
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    return _as_message(role, message.get("value")) | _present(rest)


def _message(message: Any, i: int, unused: set[str]) -> dict[str, Any]:
    """A checked copy of one message; `unused` takes the members that are left out."""
    if not isinstance(message, dict):
        raise DataError(f"message {i} is of type {type(message).__name__}; make it {{role, content}}")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"message {i} has the unknown role {role!r}; use one of {', '.join(ROLES)}{_near(message)}")
    return _at(f"message {i} ({role})", lambda: _checked(_present(message), unused))


def _near(message: dict[str, Any]) -> str:
    """What an unknown role, or the member that should hold it, was perhaps meant to be."""
    role = message.get("role")
    if role == "function_call":
        return (
            "; write a call as tool_calls of the assistant's message: [{type: function, function: {name, arguments}}]"
        )
    if isinstance(role, str):
        plain = role.strip().lower()
        plain = ROLE_ALIASES.get(plain, plain)
        return f"; did you mean {plain!r}?" if plain in ROLES else did_you_mean(role, ROLES)
    near = [(k, name) for name in message if (k := _differs_in_case(name, ("role", "from", "content", "value")))]
    return f"; did you mean {', '.join(f'{k!r} by {name!r}' for k, name in near)}?" if near else ""


def _checked(message: dict[str, Any], unused: set[str]) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    kept = {name: value for name, value in message.items() if _is_kept(name, value, unused)}
    if calls := _calls(message.get("tool_calls")):
        if role != "assistant":
            raise DataError("it has tool_calls, which only the assistant's messages may have; take them out")
        kept["tool_calls"] = calls
    is_trained(kept)
    if content is not None or not calls:
        _check_content(role, content, has_calls=bool(calls), older_calls="function_call" in kept)
    return kept


def _check_content(role: str, content: Any, has_calls: bool, older_calls: bool) -> None:
    """Refuse content that is no text and no list of parts, and an answer without any."""
    if content is None and older_calls:
        raise DataError(
            "it has a function_call, the older form; write it as tool_calls: "
            "[{type: function, function: {name, arguments}}]"
        )
    if not isinstance(content, str | list):
        remedy = "write it as JSON text" if role in ("tool", "ipython", "function") and content else "make it a text"
        raise DataError(
            f"it has content of type {type(content).__name__}; {remedy} or a list of {{type: text, text}} parts"
        )
    if isinstance(content, str) and PRINTED_PARTS.match(content):
        raise DataError("its content is a text of a list of parts; make it the list itself, or the text of the parts")
    text = content if isinstance(content, str) else "".join(part_texts(content))
    if role == "assistant" and not has_calls and is_blank(text):
        raise DataError("it is an empty answer; nothing to learn; write it or drop the row")


def _is_kept(name: str, value: Any, unused: set[str]) -> bool:
    """Whether a member of a message is passed to the template unchanged.

    Unknown members are, and the template has to render them, unless they are metadata of the message or numbers.
    """
    if name in ("role", "content"):
        return value is not None
    if name == "tool_calls" or _is_empty(value):
        return False
    if name in MARKS or name in UNCLEAR_MARKS:
        return True  # `is_trained` reads them
    if name in TEXTS and not isinstance(value, str):
        raise DataError(f"its {name!r} is of type {type(value).__name__}; make it a text")
    if known := _differs_in_case(name, MEMBERS):
        raise DataError(f"it has the unknown member {name!r}; did you mean {known!r}?")
    if name in PROVENANCE or (name not in MEMBERS and isinstance(value, bool | int | float)):
        unused.add(f"{name!r} (in its messages)")
        return False
    return True


def _calls(value: Any) -> list[Any]:
    """The calls of a message, a list or its JSON text, each with a name and arguments that are an object."""
    if _is_empty(value) or (isinstance(value, str) and value.strip() in EMPTY_JSON):
        return []
    calls = _list(value, "tool_calls")
    for k, call in enumerate(calls):
        name = function_name(call)
        if not name or call.get("type", "function") != "function":
            raise DataError(
                f"tool call {k} names no function; write it as {{type: function, function: {{name, arguments}}}}"
            )
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, str) and not is_blank(arguments):
            try:
                arguments = parse_json(arguments)
                json.dumps(arguments, allow_nan=False)  # 1e400 is read as infinity, which JSON cannot say
            except (ValueError, RecursionError) as error:
                raise DataError(f"the arguments of its call of {name!r} are not JSON ({error}); mend them") from error
        if not (isinstance(arguments, dict) or _is_empty(arguments)):
            raise DataError(
                f"the arguments of its call of {name!r} are of type {type(arguments).__name__}; make them an object"
            )
    return calls


def _check_links(messages: list[dict[str, Any]]) -> None:
    """Refuse a tool's result whose id is that of no call before it."""
    ids: list[Any] = []
    for i, message in enumerate(messages):
        ids += [call["id"] for call in message.get("tool_calls") or () if call.get("id")]
        link = message.get("tool_call_id")
        if link and ids and link not in ids:
            raise DataError(
                f"message {i} ({message['role']}) has the tool_call_id {link!r}, which no call before it has; "
                "mend the ids or take them out"
            )
