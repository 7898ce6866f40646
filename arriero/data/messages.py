"""Cells and messages of a row, checked: what the layouts of conversations and of preferences are read with.

A cell is a value of a column. None, NaN, empty texts and empty lists count as absent; 0 does not. A message is checked
and copied; of its members those stay that a template has to render, and the others are refused or named.
Every refusal is a DataError with the remedy; the reader of the row puts its place before it (`placed`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, TypeVar

from arriero.errors import DataError, did_you_mean
from arriero.io.records import RowDict, parse_json
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
SYSTEM = ("system", "system_prompt", "system_message")
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
T = TypeVar("T")


def text_of(message: dict[str, Any]) -> str:
    """A message's content, whether one text, a list of text parts, or none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def placed(where: str, read: Callable[[], T]) -> T:
    """What `read` returns; its refusal gets the place before it."""
    try:
        return read()
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def present(row: dict[str, T]) -> dict[str, T]:
    """What is there: without None, and without the NaN that tables hold in an empty cell."""
    return {k: v for k, v in row.items() if v is not None and v == v}


def as_context(message: Any) -> Any:
    """A message of a prompt: an answer in it is context, as in TRL, unless it is marked."""
    if not isinstance(message, dict) or message.get("role") != "assistant" or mark_of(present(message)) is not None:
        return message
    return {**message, "train": 0}


def asked(prompt: Any, name: str) -> Any:
    """`prompt` itself, unless there is nothing in it to answer."""
    if is_empty(prompt):
        raise DataError(f"{name!r} is empty, so there is nothing to answer; fill it or drop the row")
    return prompt


# Cells


def differs_in_case(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one is but for case, white space and quotes; None where there is none, or it is one."""
    if name in known:
        return None
    plain = name.strip("\ufeff\"' \t\r\n").lower()
    return plain if plain in known else None


def is_empty(value: Any) -> bool:
    """Whether a cell is empty; 0 and false are not."""
    return is_blank(value) if isinstance(value, str) else value is None or value in ([], {}, b"")


def text_cell(value: Any, name: str) -> str:
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


def list_cell(value: Any, name: str) -> list[Any]:
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


def as_message(role: str, content: Any) -> dict[str, Any]:
    """A message of that role."""
    return {"role": role, "content": content}


def side(role: str, value: Any, name: str) -> list[Any]:
    """One side of a prompt/completion pair: messages as they are or as JSON text, or a text as one message."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            parsed = parse_json(value)
        except (ValueError, RecursionError):
            parsed = []
        if parsed and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in parsed):
            return parsed
    return value if isinstance(value, list) else [as_message(role, text_cell(value, name))]


def system_of(row: RowDict) -> str | None:
    """The row's system text, which may stand in one of several columns."""
    given = {name: text_cell(row[name], name) for name in SYSTEM if name in row and not is_empty(row[name])}
    if len(set(given.values())) > 1:
        raise DataError(f"{' and '.join(map(repr, given))} differ; keep one")
    return next(iter(given.values()), None)


def with_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind the row's system text; refused where they begin with another one."""
    if system is None:
        return messages
    if messages[0]["role"] not in ("system", "developer"):
        return [as_message("system", system), *messages]
    if text_of(messages[0]).strip() != system.strip():
        raise DataError(f"'system' stands beside a first message of role {messages[0]['role']!r}; keep one of the two")
    return messages


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The tools, each with a name; None where there are none."""
    if is_empty(value) or (isinstance(value, str) and value.strip() in EMPTY_JSON):
        return None
    tools = list_cell(value, "tools")
    for i, tool in enumerate(tools):
        if not function_name(tool):
            raise DataError(
                f"tool {i} has no name; write it as {{type: function, function: {{name, description, parameters}}}}"
            )
    return tools


# Messages


def from_sharegpt(message: Any, i: int) -> Any:
    """{from, value} as {role, content}; anything else stays for the checks to refuse."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    for ours, theirs in (("role", "from"), ("content", "value")):
        if message.get(ours) is not None and message.get(theirs) is not None:
            raise DataError(f"message {i} has both {theirs!r} and {ours!r}; keep one")
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    role = message["from"]
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    return as_message(role, message.get("value")) | present(rest)


def checked_message(message: Any, i: int, unused: set[str]) -> dict[str, Any]:
    """A checked copy of one message; `unused` takes the members that are left out."""
    if not isinstance(message, dict):
        raise DataError(f"message {i} is of type {type(message).__name__}; make it {{role, content}}")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"message {i} has the unknown role {role!r}; use one of {', '.join(ROLES)}{_near(message)}")
    return placed(f"message {i} ({role})", lambda: _checked(present(message), unused))


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
    near = [(k, name) for name in message if (k := differs_in_case(name, ("role", "from", "content", "value")))]
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
    if name == "tool_calls" or is_empty(value):
        return False
    if name in MARKS or name in UNCLEAR_MARKS:
        return True  # `is_trained` reads them
    if name in TEXTS and not isinstance(value, str):
        raise DataError(f"its {name!r} is of type {type(value).__name__}; make it a text")
    if known := differs_in_case(name, MEMBERS):
        raise DataError(f"it has the unknown member {name!r}; did you mean {known!r}?")
    if name in PROVENANCE or (name not in MEMBERS and isinstance(value, bool | int | float)):
        unused.add(f"{name!r} (in its messages)")
        return False
    return True


def _calls(value: Any) -> list[Any]:
    """The calls of a message, a list or its JSON text, each with a name and arguments that are an object."""
    if is_empty(value) or (isinstance(value, str) and value.strip() in EMPTY_JSON):
        return []
    calls = list_cell(value, "tool_calls")
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
        if not (isinstance(arguments, dict) or is_empty(arguments)):
            raise DataError(
                f"the arguments of its call of {name!r} are of type {type(arguments).__name__}; make them an object"
            )
    return calls


def check_links(messages: list[dict[str, Any]]) -> None:
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
