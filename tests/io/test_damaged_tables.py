"""Arrow files whose buffers do not hold what they say: refused, where pyarrow itself would read beyond them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from arriero.errors import DataError
from arriero.io.records import read_records

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
