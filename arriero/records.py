"""Data files of any common container, read one row at a time: JSONL, JSON, CSV/TSV, Parquet and Arrow, plain or (the
text ones) compressed with gzip or zstd; a directory of them; or a Hub data set, which `datasets` brings as Arrow files.

What a row means is for others to say: a conversation (data/formats.py), a document (curate/sources.py). Only a .json
array is read whole. Every refusal names the file, the row (for JSONL its line) and the remedy.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from arriero.errors import DataError, UserError, require
from arriero.paths import as_path, hint

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
Row = dict[str, Any]


class Record(NamedTuple):
    """One row as read, not yet understood."""

    file: str
    row: int
    raw: bytes | Row  # a line of JSON, or the row itself
    done: float  # share of the file that has been read, for progress bars
    error: DataError | None = None  # why there is no row


def source_files(source: str | Path) -> list[Path]:
    """The data files that `source` names, in order: itself, those in the directory, or the Hub data set's."""
    path = as_path(source)
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
    if HUB_ID.fullmatch(str(source)) and _reader(path) is None and not path.is_symlink():
        return hub_files(str(source))
    raise DataError(
        f"{source}: no such file or directory; give a file, a directory, or a Hub data set id (owner/name){hint(path)}"
    )


def read_records(path: Path, after: int = 0) -> Iterator[Record]:
    """Stream the rows of one file, those numbered up to `after` left out; raises DataError for a damaged or empty one.

    Rows of Parquet are left out unread, by row groups; rows of Arrow and of text are passed over, which is many times
    faster than parsing them.
    """
    reader = _reader(path)
    assert reader is not None, path
    row = 0
    try:
        for record in reader(path, after):
            row = record.row
            if row > after:
                yield record
    except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
        raise DataError(
            f"{path}: damaged {COMPRESSED[endings(path)[1]]} data after row {row} ({error}); fetch the file again"
        ) from error
    if row == 0 and after == 0:
        raise DataError(f"{path}: the file holds no rows; remove it or fill it")


def is_readable(path: Path) -> bool:
    """Whether the name's ending is that of a container known here."""
    return _reader(path) is not None


def endings(path: Path) -> tuple[str, str]:
    """The ending of a name that says what the file holds, and that of its compression or nothing; in lower case."""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in COMPRESSED else (name.suffix, "")


def _reader(path: Path) -> Callable[[Path, int], Iterator[Record]] | None:
    return _READERS.get(endings(path)[0])


def _zstd_error() -> type[Exception]:
    """What damaged zstd data raises; an error that nothing raises where the package is not even loaded."""
    module = sys.modules.get("zstandard")
    return module.ZstdError if module else gzip.BadGzipFile


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """The file's bytes, unzipped, and a function that tells the share of the file read so far."""
    size, packing = max(1, path.stat().st_size), endings(path)[1]
    with open(path, "rb") as raw:
        if packing == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(IO[bytes], stream), lambda: raw.tell() / size
        elif packing == ".zst":
            with io.BufferedReader(_ZstdFrames(raw), buffer_size=1 << 20) as lines:
                yield cast(IO[bytes], lines), lambda: raw.tell() / size
        else:
            yield raw, lambda: raw.tell() / size


class _ZstdFrames(io.RawIOBase):
    """The content of zstd frames, one after another; unlike the package's own reader, a cut file raises EOFError."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.content, self.zstandard = raw, memoryview(b""), require("zstandard", "data")
        self.frame: Any = None  # the one being read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            rest = self.frame.unused_data if self.frame and self.frame.eof else b""
            if self.frame is None or self.frame.eof:
                rest = rest or self.raw.read(1 << 17)
                if not rest:
                    return 0
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            elif not (rest := self.raw.read(1 << 17)):
                raise EOFError("the last frame is incomplete")
            self.content = memoryview(self.frame.decompress(rest))
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count


def _read_jsonl(path: Path, after: int) -> Iterator[Record]:
    with _opened(path) as (stream, done):
        for number, line in enumerate(stream, start=1):
            if number <= after or line.strip():
                yield Record(str(path), number, line, done())


def _read_json(path: Path, after: int) -> Iterator[Record]:
    """A JSON array of rows; or JSON lines under this ending, which are common."""
    with _opened(path) as (stream, _):
        start = next((line.lstrip(b"\xef\xbb\xbf \t\r\n") for line in stream if line.strip()), b"")
    if not start.startswith(b"["):
        yield from _read_jsonl(path, after)
        return
    with _opened(path) as (stream, _):
        try:
            rows = parse_json(stream.read())
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, too deep
            raise DataError(
                f"{path}: broken JSON: {error}; mend the file, or write one object a line as .jsonl"
            ) from error
    for number, row in enumerate(rows, start=1):
        try:
            yield Record(str(path), number, as_row(row, path, number), number / len(rows))
        except DataError as error:
            yield Record(str(path), number, {}, number / len(rows), error)


def _read_csv(path: Path, after: int) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if endings(path)[0] == ".tsv" else ","
    with (
        _opened(path) as (stream, done),
        io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
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
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: it has {'more' if None in row else 'fewer'} fields than the header's {n_fields}; "
                        f"quote fields that hold a {delimiter!r} or a line break"
                    )
                "".join([*row, *row.values()]).encode("utf-8", "surrogateescape").decode()
                yield Record(str(path), number, row, done())
            except StopIteration:
                return
            except DataError as error:
                yield Record(str(path), number, {}, done(), error)
            except (csv.Error, UnicodeDecodeError) as error:
                yield Record(str(path), number, {}, done(), DataError(f"{where}: {_broken_csv(error)}"))


def _broken_csv(error: Exception) -> str:
    return f"broken CSV: {error}; write it as UTF-8 with quotes"


def _read_parquet(path: Path, after: int) -> Iterator[Record]:
    require("pyarrow", "data")
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            n_rows, passed, groups = file.metadata.num_rows, 0, range(file.num_row_groups)
            while groups and passed + file.metadata.row_group(groups[0]).num_rows <= after:
                passed += file.metadata.row_group(groups[0]).num_rows
                groups = groups[1:]
            yield from _arrow_records(path, file.iter_batches(batch_size=256, row_groups=list(groups)), n_rows, passed)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); fetch the file again") from error


def _read_arrow(path: Path, after: int) -> Iterator[Record]:
    require("pyarrow", "data")
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            yield from _arrow_records(path, batches, 0, after=after)
    except (pa.lib.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as an Arrow stream ({error}); fetch the file again") from error


def _arrow_records(path: Path, batches: Any, n_rows: int, number: int = 0, after: int = 0) -> Iterator[Record]:
    for batch in batches:
        refuse_twice(batch.schema.names, path)
        if number + batch.num_rows <= after:
            number += batch.num_rows
            continue
        for row in batch.to_pylist():
            number += 1
            # A field of a struct is there for every row of the table; None means that this row has none.
            row = {key: _without_none(value) for key, value in row.items()}
            yield Record(str(path), number, row, number / n_rows if n_rows else 0.0)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


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


_READERS: Mapping[str, Callable[[Path, int], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def parse_row(record: Record) -> Row:
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
        raise DataError(f"{where}: broken JSON: {error}; mend or drop the line") from error
    return as_row(row, record.file, record.row)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, as `json.loads`; raises ValueError also where an object has a key twice."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: Python would keep the last value of a key and say nothing of the others."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object has the key {_twice(key for key, _ in pairs)!r} twice")
    return found


def refuse_twice(names: Sequence[str], path: Path) -> None:
    """Raise DataError where two columns of a table have one name, of which a row could keep only the last."""
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two of its columns are called {_twice(names)!r}; rename or remove one")


def _twice(names: Iterable[str]) -> str:
    """The first name that comes a second time."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def as_row(value: Any, file: object, row: int) -> Row:
    """`value` itself, if it is an object; raises `DataError` naming file and row for anything else."""
    if isinstance(value, dict):
        return value
    raise DataError(f"row {row} of {file}: expected a JSON object, found {type(value).__name__}; one object a row")
