"""Data files of any common layout, streamed as conversations.

Containers are those of `arriero.records`. Layouts are recognised row by row from the column names:

    OpenAI       messages: [{role, content, tool_calls?}], tools?
    ShareGPT     conversations: [{from, value}], system?, tools?
    Alpaca       instruction, input?, output, system?
    pair         prompt + completion | prompt + response | question + answer; texts or messages, system?

Rows are read one at a time (only a .json array is read whole). Reading is apart from understanding, so that the
former runs in one process and the latter in many. Every refusal names the file, the row (for JSONL its line) and
the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import DataError
from arriero.records import Record, Row, parse_json, parse_row, read_records, source_files

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
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
LAYOUTS = (
    "'messages' (OpenAI), 'conversations' (ShareGPT), 'instruction' + 'output' (Alpaca), "
    "'prompt' + 'completion', 'prompt' + 'response', 'question' + 'answer'"
)


@dataclass(frozen=True)
class Conversation:
    """One example: OpenAI messages ending with the assistant's, the tools it may call, and where it stands."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    file: str
    row: int  # from 1; for JSONL the line

    @property
    def where(self) -> str:
        """The place, as it stands in error messages."""
        return f"row {self.row} of {self.file}"


def read_conversations(source: str | Path) -> Iterator[Conversation]:
    """Stream the conversations in a file, a directory or a Hub data set; raises DataError at the first bad row."""
    for path in source_files(source):
        for record in read_records(path):
            yield parse_record(record)


# Layouts


def parse_record(record: Record) -> Conversation:
    """Understand one row; raises DataError where it is broken or has no known layout."""
    where = f"row {record.row} of {record.file}"
    row = parse_row(record)
    messages, tools = _layout({k: v for k, v in row.items() if v is not None}, where)
    messages = [_message(m, i, where) for i, m in enumerate(messages)]
    if not messages:
        raise DataError(f"{where}: the conversation is empty; drop the row")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is the {messages[-1]['role']}'s, so there is no answer to it to learn; "
            "add the assistant's answer or drop that message"
        )
    return Conversation(messages, tools, record.file, record.row)


def _layout(row: Row, where: str) -> tuple[list[Any], list[Any] | None]:
    """The row's messages, not yet checked, and its tools."""
    tools = _list(row["tools"], "tools", where) if row.get("tools") else None
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if "messages" in row:
        return _list(row["messages"], "messages", where), tools
    if "conversations" in row:
        return system + [_from_sharegpt(m) for m in _list(row["conversations"], "conversations", where)], tools
    if "instruction" in row and "output" in row:
        prompt = "\n\n".join(str(part) for part in (row["instruction"], row.get("input")) if part)
        return [*system, _said("user", prompt), _said("assistant", row["output"])], tools
    for ask, answer in PAIRS:
        if ask in row and answer in row:
            return system + _side("user", row[ask]) + _side("assistant", row[answer]), tools
    columns = ", ".join(repr(name) for name in row) or "none"
    raise DataError(f"{where}: no known layout in its columns ({columns}); rename them to one of: {LAYOUTS}")


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _side(role: str, said: Any) -> list[Any]:
    """One side of a prompt/completion pair: messages as they are, or a text as one message."""
    return said if isinstance(said, list) else [_said(role, said)]


def _from_sharegpt(message: Any) -> Any:
    """{from, value} as {role, content}; anything else stays for the checks to refuse."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    role = message["from"]
    return {
        "role": ROLE_ALIASES.get(role, role) if isinstance(role, str) else role,
        "content": message.get("value"),
        **rest,
    }


def _list(value: Any, name: str, where: str) -> list[Any]:
    """A list, or the list in a text of JSON: how CSV and some Parquet files carry them."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(f"{where}: {name!r} is a text that is not JSON ({error}); make it a list") from error
    if not isinstance(value, list):
        raise DataError(f"{where}: {name!r} is of type {type(value).__name__}; make it a list")
    return value


def _message(message: Any, index: int, where: str) -> dict[str, Any]:
    """A checked copy of one message."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: message {index} is of type {type(message).__name__}; make it {{role, content}}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: message {index} has the unknown role {role!r}; use one of {', '.join(ROLES)}")
    if content is None and message.get("tool_calls"):
        return {k: v for k, v in message.items() if v is not None}
    text_parts = isinstance(content, list) and all(
        isinstance(p, dict) and isinstance(p.get("text"), str) for p in content
    )
    if not isinstance(content, str) and not text_parts:
        raise DataError(
            f"{where}: message {index} ({role}) has content of type {type(content).__name__}; "
            "make it a text or a list of {type: text, text} parts"
        )
    if role == "assistant" and not message.get("tool_calls") and not content:
        raise DataError(f"{where}: message {index} is an empty answer; nothing to learn; write it or drop the row")
    return {k: v for k, v in message.items() if v is not None}
