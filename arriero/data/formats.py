"""Data files of any common layout, streamed as conversations.

Containers: JSONL, JSON, CSV/TSV, Parquet and Arrow, plain or (the text ones) gzipped; a directory of them; or a Hub
data set id, which `datasets` downloads as Arrow files. Layouts are recognised row by row from the column names:

    OpenAI       messages: [{role, content, tool_calls?}], tools?
    ShareGPT     conversations: [{from, value}], system?, tools?
    Alpaca       instruction, input?, output, system?
    pair         prompt + completion | prompt + response | question + answer; texts or messages, system?

Rows are read one at a time (only a .json array is read whole). Reading is apart from understanding, so that the
former runs in one process and the latter in many. Every refusal names the file, the row (for JSONL its line) and
the remedy.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from arriero.errors import DataError, require

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
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
Row = dict[str, Any]


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


class Record(NamedTuple):
    """One row as read, not yet understood."""

    file: str
    row: int
    raw: bytes | Row  # a line of JSON, or the row itself
    done: float  # share of the file that has been read, for progress bars


def read_conversations(source: str | Path) -> Iterator[Conversation]:
    """Stream the conversations in a file, a directory or a Hub data set; raises DataError at the first bad row."""
    for path in source_files(source):
        for record in read_records(path):
            yield parse_record(record)


# Containers


def source_files(source: str | Path) -> list[Path]:
    """The data files that `source` names, in order: itself, those in the directory, or the Hub data set's."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _reader(p) and not p.name.startswith("."))
        if not files:
            raise DataError(f"{source}: no data file in this directory; put {', '.join(_READERS)} files there")
        return files
    if path.exists():
        if _reader(path) is None:
            raise DataError(f"{source}: files ending {path.suffix!r} are not read; convert it to {', '.join(_READERS)}")
        return [path]
    # A path with a known ending that does not exist is a mistyped file, not a Hub id.
    if HUB_ID.fullmatch(str(source)) and _reader(path) is None:
        return hub_files(str(source))
    raise DataError(f"{source}: no such file or directory; give a file, a directory, or a Hub data set id (owner/name)")


def read_records(path: Path) -> Iterator[Record]:
    """Stream the rows of one file; raises DataError for a damaged or empty one."""
    reader = _reader(path)
    assert reader is not None, path
    row = 0
    try:
        for record in reader(path):
            row = record.row
            yield record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip data after row {row} ({error}); fetch the file again") from error
    if row == 0:
        raise DataError(f"{path}: the file holds no rows; remove it or fill it")


def _reader(path: Path) -> Callable[[Path], Iterator[Record]] | None:
    return _READERS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """The file's bytes, unzipped, and a function that tells the share of the file read so far."""
    size = max(1, path.stat().st_size)
    with open(path, "rb") as raw:
        if path.suffix != ".gz":
            yield raw, lambda: raw.tell() / size
        else:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(IO[bytes], stream), lambda: raw.tell() / size


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _opened(path) as (stream, done):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Record(str(path), number, line, done())


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON array of rows; or JSON lines under this ending, which are common."""
    with _opened(path) as (stream, _):
        start = next((line.lstrip(b"\xef\xbb\xbf \t\r\n") for line in stream if line.strip()), b"")
    if not start.startswith(b"["):
        yield from _read_jsonl(path)
        return
    with _opened(path) as (stream, _):
        try:
            rows = json.loads(stream.read())
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, too deep
            raise DataError(
                f"{path}: broken JSON: {error}; mend the file, or write one object a line as .jsonl"
            ) from error
    for number, row in enumerate(rows, start=1):
        yield Record(str(path), number, _as_row(row, path, number), number / len(rows))


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    number = 0
    with _opened(path) as (stream, done), io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for number, row in enumerate(rows, start=1):
                if None in row or None in row.values():
                    raise DataError(
                        f"row {number} of {path}: it has {'more' if None in row else 'fewer'} fields than the header's "
                        f"{len(rows.fieldnames or ())}; quote fields that hold a {delimiter!r} or a line break"
                    )
                yield Record(str(path), number, row, done())
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"row {number + 1} of {path}: broken CSV: {error}; write it as UTF-8 with quotes"
            ) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    require("pyarrow", "data")
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _arrow_records(path, file.iter_batches(batch_size=256), file.metadata.num_rows)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); fetch the file again") from error


def _read_arrow(path: Path) -> Iterator[Record]:
    require("pyarrow", "data")
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            yield from _arrow_records(path, batches, 0)
    except (pa.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as an Arrow stream ({error}); fetch the file again") from error


def _arrow_records(path: Path, batches: Any, n_rows: int) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            # A column is there for every row of the table; None means that this row has none.
            yield Record(str(path), number, _without_none(row), number / n_rows if n_rows else 0.0)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def hub_files(name: str) -> list[Path]:
    """Download the train split of `owner/name` or `owner/name:config` and return its Arrow files."""
    datasets = require("datasets", "data")
    repo, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(repo, config or None, split="train")
    except (ValueError, OSError) as error:  # unknown id, several configs, no such split, no network
        raise DataError(
            f"Hub data set {name}: {error}; check the id, and name a config as owner/name:config"
        ) from error
    return [Path(file["filename"]) for file in table.cache_files]


_READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# Layouts


def parse_record(record: Record) -> Conversation:
    """Understand one row; raises DataError where it is broken or has no known layout."""
    where = f"row {record.row} of {record.file}"
    row = record.raw
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except RecursionError as error:
            raise DataError(f"{where}: the JSON is nested too deeply; flatten it or drop the line") from error
        except ValueError as error:
            raise DataError(f"{where}: broken JSON: {error}; mend or drop the line") from error
        row = _as_row(row, record.file, record.row)
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


def _as_row(value: Any, file: object, row: int) -> Row:
    if isinstance(value, dict):
        return value
    raise DataError(f"row {row} of {file}: expected a JSON object, found {type(value).__name__}; one object a row")


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
            value = json.loads(value)
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
