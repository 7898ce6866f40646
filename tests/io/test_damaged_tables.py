"""Arrow files whose buffers do not hold what they say: refused, where pyarrow itself would read beyond them."""

from __future__ import annotations

import datetime
import io
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from arriero.errors import DataError
from arriero.io.records import parse_row, read_records
from arriero.io.tables import read_parquet

TEXTS = ["first", "second text", "third"]


def written(new, table: pa.Table, wrong: bytes, put: bytes) -> bytes:
    """The file of a table, in which the last occurrence of `wrong` is something else."""
    out = io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    at = out.getvalue().rindex(wrong)
    return out.getvalue()[:at] + put + out.getvalue()[at + len(wrong) :]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
@pytest.mark.parametrize("far", [10**9, -5, 6], ids=["beyond", "below", "out of order"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_offsets_that_go_nowhere_are_refused(new, far: int, nested: bool, tmp_path: Path) -> None:
    values = [[text] for text in TEXTS] if nested else TEXTS
    offsets = struct.pack("<4i", 0, 5, 16, 21)
    (tmp_path / "a.arrow").write_bytes(
        written(new, pa.table({"text": values}), offsets, struct.pack("<4i", 0, far if far != 6 else 17, 16, 21))
    )
    with pytest.raises(DataError, match=r"a\.arrow: not readable as an Arrow stream or file \(.*\); fetch"):
        list(read_records(tmp_path / "a.arrow"))


def test_pyarrow_alone_does_not_survive_such_a_file(tmp_path: Path) -> None:
    wild = struct.pack("<4i", 0, 10**9, 2 * 10**9, 2 * 10**9 + 5)
    data = written(pa.ipc.new_stream, pa.table({"text": TEXTS}), struct.pack("<4i", 0, 5, 16, 21), wild)
    (tmp_path / "a.arrow").write_bytes(data)
    code = "import pyarrow as pa, sys; print(pa.ipc.open_stream(open(sys.argv[1], 'rb')).read_all().to_pylist())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.arrow")], capture_output=True, check=False)
    assert done.returncode != 0


def test_rows_that_take_no_bytes_are_bounded(tmp_path: Path) -> None:
    table = pa.table({"text": pa.nulls(100_000_000)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a\.arrow: a batch of 100,000,000 rows in so small a file"):
        next(iter(read_records(tmp_path / "a.arrow")))


def test_bytes_that_are_no_text_cost_their_row_alone(tmp_path: Path) -> None:
    bad = pa.array([[b"good"], [b"\xff\xfe"], [b"fine"]]).view(pa.list_(pa.string()))
    table = pa.table({"text": bad})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    found = list(read_records(tmp_path / "a.arrow"))
    assert [record.raw for record in found if record.error is None] == [{"text": ["good"]}, {"text": ["fine"]}]
    assert [record.row for record in found if record.error is not None] == [2]


MS = 2**40  # after 1970: some time on 3 November 2004


@pytest.mark.parametrize(
    ("values", "read"),
    [
        (pa.array([MS], pa.date64()), datetime.date(2004, 11, 3)),
        (pa.array([[MS]], pa.list_(pa.date64())), [datetime.date(2004, 11, 3)]),
        (pa.array([[MS]], pa.list_(pa.date64(), 1)), [datetime.date(2004, 11, 3)]),
        (pa.array([[("a", MS)]], pa.map_(pa.string(), pa.date64())), [("a", datetime.date(2004, 11, 3))]),
        (pa.array([b"\1" + bytes(14) + b"\1"]).view(pa.binary()).cast(pa.binary(16)).view(pa.decimal128(5, 2)), None),
    ],
    ids=["date", "list", "list of one", "map", "decimal"],
)
def test_values_that_break_a_rule_of_their_type_do_not_cost_the_file(values: pa.Array, read, tmp_path: Path) -> None:
    with pytest.raises(pa.ArrowInvalid):
        values.validate(full=True)
    table = pa.table({"text": ["one"], "more": values})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    [record] = read_records(tmp_path / "a.arrow")
    assert record.error is None and record.raw["text"] == "one"
    assert read is None or record.raw["more"] == read


def test_a_time_beyond_the_day_is_refused_since_pyarrow_makes_another_of_it(tmp_path: Path) -> None:
    table = pa.table({"text": ["one"], "at": pa.array([10**8], pa.int32()).view(pa.time32("ms"))})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a\.arrow: not readable .*100000000 is not within the acceptable range"):
        list(read_records(tmp_path / "a.arrow"))


def without_levels(file: Path, columns: dict[str, list]) -> None:
    """Write a Parquet file whose last column alone may be null, then make its schema say that it may not.

    So its size statistics count definition levels that the schema has not.
    """
    names = list(columns)
    schema = pa.schema([pa.field(name, pa.string(), nullable=name == names[-1]) for name in names])
    pa.parquet.write_table(pa.table(columns, schema=schema), file, row_group_size=2, store_schema=False)
    data = file.read_bytes()
    name = names[-1].encode()
    optional, required = (b"\x25" + r + b"\x18" + bytes([len(name)]) + name for r in (b"\x02", b"\x00"))
    assert data.count(optional) == 1
    file.write_bytes(data.replace(optional, required))


COLUMNS = {"a": ["1", "2", "3"], "text": TEXTS, "note": ["x", "y", "z"]}


def test_size_statistics_of_another_schema_are_refused(tmp_path: Path) -> None:
    without_levels(tmp_path / "a.parquet", COLUMNS)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read \(Definition level histogram size.*\); fetch"):
        list(read_records(tmp_path / "a.parquet"))


def test_size_statistics_of_columns_that_nobody_asks_for_do_no_harm(tmp_path: Path) -> None:
    without_levels(tmp_path / "a.parquet", COLUMNS)
    found = read_parquet(tmp_path / "a.parquet", 0, lambda name, holds_bytes: name == "text")
    assert [row.row for row in found] == [{"text": text} for text in TEXTS]


def test_pyarrow_alone_ends_the_process_at_such_statistics(tmp_path: Path) -> None:
    without_levels(tmp_path / "a.parquet", COLUMNS)
    code = "import pyarrow.parquet as p, sys; p.ParquetFile(sys.argv[1]).metadata.row_group(0).column(2)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGABRT


def write_packed(path: Path, table: pa.Table, codec: str, as_file: bool) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=codec)
    opened = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as out, opened(out, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "stream"])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_packed_buffers_are_read(tmp_path: Path, codec: str, as_file: bool) -> None:
    texts = [f"text {i} of a llama" * (i % 7) for i in range(1000)]
    kinds = pa.array(["a", "b"] * 500).dictionary_encode()
    path = write_packed(tmp_path / "a.arrow", pa.table({"text": texts, "kind": kinds}), codec, as_file)
    rows = [parse_row(record) for record in read_records(path)]
    assert [row["text"] for row in rows] == texts
    assert [row["kind"] for row in rows[:3]] == ["a", "b", "a"]


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "stream"])
@pytest.mark.parametrize("where", ["values", "dictionary"])
def test_packed_buffers_that_state_very_much_are_refused_before_they_are_unpacked(
    tmp_path: Path, where: str, as_file: bool
) -> None:
    bomb = pa.array(["\0" * 100_000_000])
    table = pa.table({"text": bomb.dictionary_encode() if where == "dictionary" else bomb})
    path = write_packed(tmp_path / "a.arrow", table, "zstd", as_file)
    assert path.stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"a\.arrow: a batch unpacks from [\d,]+ to 100,000,\d\d\d bytes, as no text"):
        list(read_records(path))
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_a_file_whose_footer_names_more_batches_than_lie_in_it_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["a" * 50] * 300})
    path = write_packed(tmp_path / "a.arrow", table, "zstd", as_file=True)
    data = path.read_bytes()
    end = data.index(b"\xff\xff\xff\xff\0\0\0\0")  # the stream's end
    second = data.index(b"\xff\xff\xff\xff", data.index(b"\xff\xff\xff\xff", 12) + 4)
    path.write_bytes(data[:second] + data[end : end + 8] + data[second + 8 :])
    with pytest.raises(DataError, match=r"its footer names 3 batches, and \d lie in it|not readable as an Arrow"):
        list(read_records(path))
