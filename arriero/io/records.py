"""Data files of any common container, read one row at a time: JSONL, JSON, CSV/TSV, Parquet and Arrow, plain or (the
text ones) compressed with gzip, zstd, bzip2 or xz; a directory of them; or a Hub data set, which `datasets` brings as
Arrow files.

The meaning of a row is left to the callers: a conversation (data/formats.py), a document (curate/sources.py).
streams.py decompresses and decodes bytes, tables.py reads tables. Every error names the file, the row (for JSONL its
line) and the remedy.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from arriero.errors import DataError, UserError, require
from arriero.io.paths import as_path, files_below, hint
from arriero.io.streams import COMPRESSED, CannotGoOn, Damaged, Opened, endings, opened
from arriero.io.tables import TableRow, Wanted, read_arrow, read_parquet, refuse_twice, twice

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
RowDict = dict[str, Any]


class Record(NamedTuple):
    """One row as read, not yet understood."""

    file: str
    row: int
    raw: bytes | RowDict  # a line of JSON, or the row itself
    done: float  # share of the file that has been read, for progress bars
    error: DataError | None = None  # why there is no row
    unread: tuple[str, ...] = ()  # columns of a table that were not requested


def source_files(source: str | Path) -> list[Path]:
    """The data files that `source` names, in order: itself, those in the directory, or the Hub data set's."""
    path = as_path(source)
    if path.is_dir():
        files = [p for p in files_below(path) if _reader(p) and not p.name.startswith(".")]
        if not files:
            raise DataError(f"{source}: no data file in this directory; put {', '.join(_READERS)} files there")
        return files
    if path.exists():
        if _reader(path) is None:
            raise DataError(f"{source}: files ending {path.suffix!r} are not read; convert it to {', '.join(_READERS)}")
        return [path]
    # A path with a known ending that does not exist is a mistyped file, not a Hub id.
    if HUB_ID.fullmatch(str(source)) and _reader(path) is None and not path.is_symlink():
        return hub_files(str(source))
    raise DataError(
        f"{source}: no such file or directory; give a file, a directory, or a Hub data set id (owner/name){hint(path)}"
    )


def every_column(name: str, holds_bytes: bool) -> bool:
    """What is asked of a table where nothing else is."""
    return True


def read_records(path: Path, after: int = 0, wanted: Wanted = every_column) -> Iterator[Record]:
    """Stream the rows of one file, those numbered up to `after` left out; raises DataError for a damaged or empty one.

    Rows of Parquet are left out unread, by row groups; rows of Arrow and of text are passed over, which is many times
    faster than parsing them. wanted: which columns of a Parquet or Arrow file to read; others are not decoded.
    """
    reader = _reader(path)
    assert reader is not None, path
    row = 0
    try:
        for record in reader(path, after, wanted):
            row = record.row
            if row > after:
                yield record
    except Damaged as error:
        raise DataError(
            f"{path}: damaged {COMPRESSED[endings(path)[1]]} data after row {row} ({error}); fetch the file again"
        ) from error
    if row == 0 and after == 0:
        raise DataError(f"{path}: the file holds no rows; remove it or fill it")


def is_readable(path: Path) -> bool:
    """Whether the name's ending is that of a container known here."""
    return _reader(path) is not None


def _reader(path: Path) -> Callable[[Path, int, Wanted], Iterator[Record]] | None:
    ending, packing = endings(path)
    return None if packing and ending in TABLES else _READERS.get(ending)


UNTOLD = 1 << 16  # bytes of lines between looks at how far a file has been read: each is a system call


def _read_jsonl(path: Path, after: int, wanted: Wanted) -> Iterator[Record]:
    name, done, untold = str(path), 0.0, UNTOLD
    with opened(path) as file:
        for number, line in enumerate(_lines(file.stream), start=1):
            untold += len(line)
            if untold >= UNTOLD:
                done, untold = file.done(), 0
            is_blank = line.isspace()
            if not is_blank:  # blank lines are no rows: a packed file could have them by the hundred million
                file.row_ends()
            if number <= after or not is_blank:
                yield Record(name, number, line, done)


def _lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end at \\n, \\r\\n or \\r; within a text JSON writes these as escapes."""
    for line in stream:
        if line.find(b"\r", 0, len(line) - 2) < 0:
            yield line
        else:
            yield from line.splitlines(keepends=True)  # of bytes: at these three alone


def _read_json(path: Path, after: int, wanted: Wanted) -> Iterator[Record]:
    """An array of rows, or rows one after another on any number of lines; or JSON lines, which are common under this
    ending and which workers can parse."""
    if not _is_lines(path):
        yield from _read_values(path)
    else:
        yield from _read_jsonl(path, after, wanted)


def _is_lines(path: Path) -> bool:
    """Whether the first line is a row, or nothing that JSON begins with."""
    with opened(path) as file:
        first = next((line for line in file.stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    if first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return False
    try:
        json.loads(first)
        return True
    except (ValueError, RecursionError):
        pass
    try:
        return next(_read_values(path), None) is None
    except CannotGoOn:
        raise
    except DataError:
        return True


def _read_values(path: Path) -> Iterator[Record]:
    number = 0
    with opened(path) as file:
        try:
            for number, (value, fault) in enumerate(_json_values(file), start=1):
                try:
                    if fault:
                        raise DataError(f"row {number} of {path}: broken JSON: {fault}; mend or drop it")
                    yield Record(str(path), number, as_row(value, path, number), file.done())
                except DataError as error:
                    yield Record(str(path), number, {}, file.done(), error)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}, counted from there"
            raise DataError(
                f"{path}: broken JSON behind row {number}: {error.msg} ({where}); mend the file, or write one object a "
                "line as .jsonl"
            ) from error
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError, too deep
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: broken JSON behind row {number}: {error}; mend the file, or write one object a line as .jsonl"
            ) from error


SPACE = re.compile(r"[ \t\r\n]*")


def _json_values(file: Opened) -> Iterator[tuple[Any, str]]:
    """The elements of an array, or values one after another; each with what is at fault in it, or nothing.

    A value is parsed when it is there as a whole; what is read at a time doubles until then.
    """
    faults: list[str] = []
    json_decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: _noting(pairs, faults))
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    text, at, has_more = "", 0, True

    def read() -> None:
        nonlocal text, at, has_more
        data = file.stream.read(max(1 << 18, len(text) - at))
        has_more = bool(data)
        text, at = text[at:] + utf8.decode(data, not data), 0

    def skip_space() -> str:
        nonlocal at
        while (at := SPACE.match(text, at).end()) == len(text) and has_more:  # type: ignore[union-attr]
            read()
        return text[at : at + 1]

    in_array = skip_space() == "["
    at += in_array
    while (char := skip_space()) != "]" if in_array else (char := skip_space()):
        if not char:
            raise json.JSONDecodeError("the array does not end", text, at)
        faults.clear()
        try:
            value, end = json_decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            if not has_more:
                raise
            read()
            continue
        if end == len(text) and has_more:  # a number may go on
            read()
            continue
        at = end
        file.row_ends()
        yield value, faults[0] if faults else ""
        if in_array and (char := skip_space()) != "]":
            if char != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at += 1
    at += in_array
    if skip_space():
        raise json.JSONDecodeError("Extra data", text, at)


def _read_csv(path: Path, after: int, wanted: Wanted) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if endings(path)[0] == ".tsv" else ","
    with (
        opened(path) as file,
        io.TextIOWrapper(file.stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            names = rows.fieldnames or ()
        except csv.Error as error:
            raise DataError(f"{path}: its header is {_broken_csv(error)}") from error
        refuse_twice(names, path)
        n_fields = len(names)
        for number in itertools.count(1):
            where = f"row {number} of {path}"
            try:
                row = next(rows)
                file.row_ends()
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: it has {'more' if None in row else 'fewer'} fields than the header's {n_fields}; "
                        f"quote fields that hold a {delimiter!r} or a line break"
                    )
                "".join([*row, *row.values()]).encode("utf-8", "surrogateescape").decode()
                yield Record(str(path), number, row, file.done())
            except StopIteration:
                return
            except CannotGoOn:
                raise
            except DataError as error:
                yield Record(str(path), number, {}, file.done(), error)
            except (csv.Error, UnicodeDecodeError) as error:
                yield Record(str(path), number, {}, file.done(), DataError(f"{where}: {_broken_csv(error)}"))


def _broken_csv(error: Exception) -> str:
    return f"broken CSV: {error}; write it as UTF-8 with quotes"


def _read_parquet(path: Path, after: int, wanted: Wanted) -> Iterator[Record]:
    yield from _table_records(path, read_parquet(path, after, wanted))


def _read_arrow(path: Path, after: int, wanted: Wanted) -> Iterator[Record]:
    yield from _table_records(path, read_arrow(path, after, wanted))


def _table_records(path: Path, rows: Iterator[TableRow]) -> Iterator[Record]:
    for number, row, done, error, unread in rows:
        yield Record(str(path), number, row, done, error, unread)


def hub_files(name: str) -> list[Path]:
    """Download the train split of `owner/name` or `owner/name:config` and return its Arrow files."""
    try:
        datasets = require("datasets", "data")
    except UserError as error:
        raise DataError(f"{name}: no such file or directory; to read it as a Hub data set, {error}") from error
    repo, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(repo, config or None, split="train")
    except (ValueError, OSError) as error:  # unknown id, several configs, no such split, no network
        raise DataError(
            f"{name}: no such file or directory, and Hub data set {name}: {error}; check the id (with a config: "
            "owner/name:config) and the network, without which only what `datasets` has in its cache can be read"
        ) from error
    return [Path(file["filename"]) for file in table.cache_files]


TABLES = (".parquet", ".arrow", ".feather", ".ipc")  # which are packed within
_READERS: Mapping[str, Callable[[Path, int, Wanted], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
    ".ipc": _read_arrow,
}


def parse_row(record: Record) -> RowDict:
    """The row as a dict; raises DataError where there is none, its JSON is broken or no object."""
    if record.error is not None:
        raise record.error
    if not isinstance(record.raw, bytes):
        return record.raw
    where = f"row {record.row} of {record.file}"
    try:
        row = parse_json(record.raw.decode("utf-8-sig"))
    except RecursionError as error:
        raise DataError(f"{where}: the JSON is nested too deeply; flatten it or drop the line") from error
    except ValueError as error:
        opens = record.raw.strip().endswith((b"{", b"[", b","))
        remedy = "where an object goes on over several lines, call the file .json" if opens else "mend or drop the line"
        raise DataError(f"{where}: broken JSON: {error}; {remedy}") from error
    return as_row(row, record.file, record.row)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, as `json.loads`; raises ValueError also where an object has a key twice."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: Python would silently keep the last value of a key."""
    faults: list[str] = []
    found = _noting(pairs, faults)
    if faults:
        raise ValueError(faults[0])
    return found


def _noting(pairs: list[tuple[str, Any]], faults: list[str]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        faults.append(f"an object has the key {twice(key for key, _ in pairs)!r} twice")
    return found


def as_row(value: Any, file: object, row: int) -> RowDict:
    """`value` itself, if it is an object; raises `DataError` naming file and row for anything else."""
    if isinstance(value, dict):
        return value
    raise DataError(f"row {row} of {file}: expected a JSON object, found {type(value).__name__}; one object a row")


def rows_within(row: RowDict) -> str:
    """A hint for a row that may be a file's only one, with the rows inside: {"version": 1, "data": [{...}, ...]}."""
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return f"; {key!r} is a list of objects: if they are the rows, write one a line, as `jq -c '.{key}[]'` does"
    return ""
