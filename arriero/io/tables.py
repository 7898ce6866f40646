"""Rows of Parquet and Arrow files (streams, files and so Feather), of the columns that are asked for.

A row is refused, with its column, if Python cannot represent a value of it, such as text that is not UTF-8 or a date
beyond the year 9999; times and durations in nanoseconds are read as text. Parquet is read by row groups, in batches of
at most 64 rows and some 16 MB.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from arriero.errors import DataError, require
from arriero.io.arrow_messages import unpacked_sizes
from arriero.io.reading import reading

ROWS, BYTES = 64, 16_000_000  # of a batch
MOST, RATIO = 32_000_000, 100  # of a row group's column: unpacked bytes, or for each packed one

PARQUET, ARROW = "Parquet", "an Arrow stream or file"
Wanted = Callable[[str, bool], bool]
"""Whether a column is asked for, given its name and whether it holds bytes."""


class TableRow(NamedTuple):
    """A row, or why there is none, and the columns that were not read."""

    number: int
    row: dict[str, Any]
    done: float
    error: DataError | None
    unread: tuple[str, ...]


def read_parquet(path: Path, after: int, wanted: Wanted) -> Iterator[TableRow]:
    """The rows behind the first `after`, which are left out unread as far as they are whole row groups."""
    require("pyarrow", "data")
    import pyarrow.parquet

    with ExitStack() as stack:
        with _library(path, PARQUET):
            file = stack.enter_context(pyarrow.parquet.ParquetFile(path))
            schema = file.schema_arrow
        names, unread = _columns(schema, path, wanted)
        leaves = _leaves(file, names, path)
        n_rows, passed = file.metadata.num_rows, 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if passed + group.num_rows > after and leaves:
                _check_described(file, number, names, path)
            if passed + group.num_rows > after:
                size = _unpacked_size(group, leaves, path, passed)
                rows = max(1, min(ROWS, BYTES * group.num_rows // max(1, size)))
                batches = file.iter_batches(batch_size=rows, row_groups=[number], columns=names)
                yield from _rows(path, _guarded(batches, path, PARQUET), unread, passed, after, n_rows)
            passed += group.num_rows


def read_arrow(path: Path, after: int, wanted: Wanted) -> Iterator[TableRow]:
    """The rows behind the first `after`, whose batches are not turned into rows."""
    pa = require("pyarrow", "data")
    import pyarrow.ipc

    with open(path, "rb") as head:
        magic = head.read(6)
    if magic.startswith(b"FEA1"):
        raise DataError(f"{path}: Feather of version 1, which is not read; write it as version 2 or as Parquet")
    is_file = magic == b"ARROW1"
    opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
    with ExitStack() as stack:
        with _library(path, ARROW):
            source = stack.enter_context(pa.memory_map(str(path)))
            first = stack.enter_context(opened(source))
            schema, expected = first.schema, first.num_record_batches if is_file else None
        names, unread = _columns(schema, path, wanted)
        begin = 8 if is_file else 0  # a file is a stream between eight bytes and a footer
        with _library(path, ARROW):
            source.seek(begin)
        n_batches = _check_unpacked(source, path, expected)
        with _library(path, ARROW):
            source.seek(begin)
            options = pyarrow.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in names])
            reader = stack.enter_context(pyarrow.ipc.open_stream(source, options=options))
        every = itertools.islice(_guarded(reader, path, ARROW), n_batches)
        yield from _rows(path, _sound(every, path), unread, 0, after, 0)


def _check_unpacked(source: Any, path: Path, expected: int | None) -> int:
    """The number of batches of rows in an Arrow stream; refuses one that unpacks to very many times its size.

    expected: how many the footer of a file names; there the messages may end at the footer, which is none.
    """
    import pyarrow.ipc

    with _library(path, ARROW):
        sizes = unpacked_sizes(pyarrow.ipc.MessageReader.open_stream(source))
    n_batches = 0
    while expected is None or n_batches < expected:
        with _library(path, ARROW):
            found = next(sizes, None)
        if found is None:
            break
        packed, size, has_rows = found
        if size > max(MOST, RATIO * packed):
            raise DataError(
                f"{path}: a batch unpacks from {packed:,} to {size:,} bytes, as no text does; look at the file"
            )
        n_batches += has_rows
    if expected is not None and n_batches < expected:
        raise DataError(
            f"{path}: its footer names {expected:,} batches, and {n_batches:,} lie in it; fetch the file again"
        )
    return n_batches


def _library(path: Path, kind: str) -> AbstractContextManager[None]:
    """Around calls of pyarrow: what it raises is the file's fault."""
    return reading(path, f"not readable as {kind}", "fetch the file again", DataError)


def _guarded(batches: Any, path: Path, kind: str) -> Iterator[Any]:
    iterator = iter(batches)
    while True:
        with _library(path, kind):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def _sound(batches: Iterator[Any], path: Path) -> Iterator[Any]:
    """Batches whose buffers are large enough; of others pyarrow, which does not check, would read beyond the end."""
    most = max(MOST, RATIO * path.stat().st_size)  # rows of nulls take no bytes
    for batch in batches:
        with _library(path, ARROW):
            batch.validate()
            for column in batch.columns:
                column.view(_of_bytes(column.type)).validate(full=True)
        if batch.num_rows > most:
            raise DataError(f"{path}: a batch of {batch.num_rows:,} rows in so small a file; look at the file")
        yield batch


def _of_bytes(type_: Any) -> Any:
    """An Arrow type that is stored alike, without what is checked of single values: those cost their row, not the file.

    Texts are bytes (they may be no UTF-8), days in milliseconds are numbers (they may not be whole days), decimals are
    bytes (they may have too many digits). A time of day stays: pyarrow makes another time of one beyond 24 hours.
    """
    import pyarrow as pa

    plain = {
        pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view(),
        pa.date64(): pa.int64(),
    }  # fmt: skip
    types = pa.types
    if types.is_decimal(type_):
        return pa.binary(type_.byte_width)
    if types.is_struct(type_):
        return pa.struct([field.with_type(_of_bytes(field.type)) for field in type_])
    if types.is_map(type_):
        return pa.map_(
            type_.key_field.with_type(_of_bytes(type_.key_type)), type_.item_field.with_type(_of_bytes(type_.item_type))
        )
    for is_kind, make in ((types.is_list, pa.list_), (types.is_large_list, pa.large_list)):
        if is_kind(type_):
            return make(type_.value_field.with_type(_of_bytes(type_.value_type)))
    if types.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(_of_bytes(type_.value_type)), type_.list_size)
    return plain.get(type_, type_)


def _columns(schema: Any, path: Path, wanted: Wanted) -> tuple[list[str], tuple[str, ...]]:
    with _library(path, "a table"):
        types = [(field.name, field.type) for field in schema]
    every = [name for name, _ in types]
    refuse_twice(every, path)
    names = [name for name, type_ in types if wanted(name, _holds_bytes(type_))]
    return names, tuple(name for name in every if name not in names)


def _holds_bytes(type_: Any) -> bool:
    """Whether values of an Arrow type are bytes, or hold some."""
    import pyarrow.types as types

    if types.is_dictionary(type_):
        return _holds_bytes(type_.value_type)
    if types.is_nested(type_):
        return any(_holds_bytes(type_.field(i).type) for i in range(type_.num_fields))
    return any(
        is_kind(type_)
        for is_kind in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    )


def _leaves(file: Any, names: Sequence[str], path: Path) -> dict[int, str]:
    """The leaf columns of a Parquet file that these columns are made of: place and full name."""
    asked = set(names)
    with _library(path, PARQUET):
        every = [file.schema.column(i).path for i in range(len(file.schema))]
    return {i: name for i, name in enumerate(every) if name in asked or name.partition(".")[0] in asked}


def _check_described(file: Any, number: int, names: Sequence[str], path: Path) -> None:
    """Refuse a row group whose columns pyarrow cannot describe, such as by size statistics of another schema.

    Where it is asked for such a description itself, it ends the process (std::terminate in `RowGroupMetaData.column`).
    Its reader of rows raises what is wrong, and describes every column before it reads a page: so it is given a file
    that has none. Half a millisecond.
    """
    import pyarrow.parquet

    described = pyarrow.parquet.ParquetFile(
        _Pageless(path.stat().st_size), metadata=file.metadata, buffer_size=4096, pre_buffer=False
    )
    with _library(path, PARQUET):
        try:
            next(described.iter_batches(batch_size=1, row_groups=[number], columns=names), None)
        except _PageWantedError:
            return


class _PageWantedError(Exception):
    """Somebody reads from a `_Pageless`."""


class _Pageless(io.RawIOBase):
    """A file of so many bytes, none of which can be read."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        raise _PageWantedError


def _unpacked_size(group: Any, leaves: Mapping[int, str], path: Path, passed: int) -> int:
    """Bytes of a row group's columns as its file states them; refuses one that unpacks to very many times its size."""
    total = 0
    for i, name in leaves.items():
        with _library(path, PARQUET):
            column = group.column(i)
            size, packed = column.total_uncompressed_size, column.total_compressed_size
        if size > max(MOST, RATIO * packed):
            raise DataError(
                f"{path}: the column {name!r} unpacks from {packed:,} to {size:,} bytes behind "
                f"row {passed}, as no text does; look at the file"
            )
        total += size
    return total


def _rows(
    path: Path, batches: Any, unread: tuple[str, ...], number: int, after: int, n_rows: int
) -> Iterator[TableRow]:
    for batch in batches:
        end = number + batch.num_rows
        start = max(0, after - number)
        step = max(1, min(ROWS, BYTES * batch.num_rows // max(1, batch.nbytes)))
        for first in range(start, batch.num_rows, step):
            piece = batch.slice(first, step)
            for i, (row, error) in enumerate(_values(piece, path, number + first), start=number + first + 1):
                yield TableRow(i, row, i / n_rows if n_rows else 0.0, error, unread)
        number = end


def _values(batch: Any, path: Path, passed: int) -> Iterator[tuple[dict[str, Any], DataError | None]]:
    """The rows of a batch; where Python cannot hold one of its values, value by value."""
    if not batch.num_columns:
        yield from (({}, None) for _ in range(batch.num_rows))
        return
    try:
        rows = batch.to_pylist()
    except Exception:  # of many kinds: UnicodeError, ValueError, OverflowError, KeyError for a time zone, Arrow's own
        rows = [None] * batch.num_rows
    for i, row in enumerate(rows):
        error = None
        if row is None:
            row, error = _row(batch, i, f"row {passed + i + 1} of {path}")
        # A field of a struct is there for every row of the table; None means that this row has none.
        yield {key: _without_none(value) for key, value in row.items()}, error


def _row(batch: Any, i: int, where: str) -> tuple[dict[str, Any], DataError | None]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _value(column[i])
        except Exception as error:
            reason = str(error).partition("\n")[0]
            return {}, DataError(
                f"{where}: the column {name!r} holds a value that cannot be read ({reason}); mend it or drop the row"
            )
    return row, None


def _value(scalar: Any) -> Any:
    """A value of Python's; times and durations of nanoseconds, which Python has not, as text."""
    import pyarrow as pa

    try:
        return scalar.as_py()
    except ValueError:
        kind = scalar.type
        if getattr(kind, "unit", "") != "ns":
            raise
        return f"{scalar.value} ns" if pa.types.is_duration(kind) else scalar.cast(pa.string()).as_py()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def refuse_twice(names: Sequence[str], path: Path) -> None:
    """Raise DataError where two columns of a table have one name, of which a row could keep only the last."""
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two of its columns are called {twice(names)!r}; rename or remove one")


def twice(names: Iterable[str]) -> str:
    """The first name that comes a second time."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
