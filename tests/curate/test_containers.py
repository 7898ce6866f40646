"""Files as other tools leave them: read, or refused by name with the row, the column and the remedy."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import logging
import lzma
import re
import tracemalloc

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from helpers.rows import read_conversations

from arriero.curate.sources import Position, list_files, read_documents, read_from
from arriero.errors import DataError
from arriero.io import streams, tables
from arriero.io.records import read_records
from arriero.show import terminal

TEXTS = [f"Llama number {i} hums." for i in range(7)]
PACK = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".bz2": bz2.compress,
    ".xz": lzma.compress,
}  # fmt: skip


def texts(path, **options):
    """Texts, and errors."""
    errors = []
    return [d.text for d in read_documents([path], on_error=errors.append, **options)], [str(e) for e in errors]


def as_csv(values):
    file = io.StringIO()
    csv.writer(file).writerows([["text"], *[[value] for value in values]])
    return file.getvalue()


LAYOUTS = {
    "lines.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in TEXTS),
    "lines.json": "".join(json.dumps({"text": t}) + "\n" for t in TEXTS),
    "array.json": json.dumps([{"text": t} for t in TEXTS]),
    "pretty.json": json.dumps([{"text": t} for t in TEXTS], indent=2),
    "after another.json": "\n".join(json.dumps({"text": t}, indent=2) for t in TEXTS),
    "without a space.json": "\n\n " + "".join(json.dumps({"text": t}, indent=1) for t in TEXTS),
    "table.csv": as_csv(TEXTS),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_read_in_every_layout_packing_and_unicode_encoding(tmp_path, name, packing, encoding):
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACK[packing](LAYOUTS[name].encode(encoding)))
    assert texts(path) == (TEXTS, [])
    files = list_files([path])
    assert [d.text for d, _ in read_from(files, Position(0, 3))] == TEXTS[-4:] or name.startswith("without")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.c"])
def test_plain_text_is_read_in_every_unicode_encoding(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("First line.\r\nÜber.".encode(encoding))
    assert texts(tmp_path / name) == (["First line.\r\nÜber."], [])


def test_large_values_of_json_are_read_though_they_come_in_pieces(tmp_path):
    rows = [{"text": "é" * 400_000}, {"text": "b", "n": 12.5}, {"text": "[{" * 200_000}, {"text": "", "l": [[]] * 9}]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
        assert texts(tmp_path / "a.json") == ([row["text"] for row in rows], [])


@pytest.mark.parametrize(
    ("content", "kept", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', ["a"], r"broken JSON behind row 1: Expecting ',' delimiter"),
        ('[{"text": "a"} {"text": "b"}]', ["a"], r"broken JSON behind row 1: Expecting ',' delimiter"),
        ('[{"text": "a"}', ["a"], r"broken JSON behind row 1: Expecting ',' delimiter"),
        ('[{"text": "a"},', ["a"], r"broken JSON behind row 1: the array does not end"),
        ('[{"text": "a"}] x', ["a"], r"broken JSON behind row 1: Extra data .*; mend the file, or write"),
        ('{\n"text": "a"}\n{\n"text": }', ["a"], r"broken JSON behind row 1: Expecting value"),
        (
            '[{"text": "a"}, {"text": "b", "text": "c"}, {"text": "d"}]', ["a", "d"],
            r"row 2 of .*: broken JSON: an object has the key 'text' twice; mend or drop it",
        ),
        ('[{"text": "a"}, 5, {"text": "b"}]', ["a", "b"], r"row 2 of .*: expected a JSON object, found int"),
        ("[" * 100_000, [], r"broken JSON behind row 0: maximum recursion"),
        ('{"text": "a"}\n{"text": \n{"text": "c"}\n', ["a", "c"], r"row 2 of .*: broken JSON"),
        (
            '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', [],
            r"row 1 of .*: no column 'text' \(there are: 'version', 'data'\); name the text's with --text-key; 'data' "
            r"is a list of objects: if they are the rows, write one a line, as `jq -c '\.data\[\]'` does",
        ),
    ],
)  # fmt: skip
def test_json_that_is_no_list_of_rows_is_named(tmp_path, content, kept, message):
    (tmp_path / "a.json").write_text(content)
    found, errors = texts(tmp_path / "a.json")
    assert found == kept and len(errors) == 1 and re.search(message, errors[0])


def test_objects_over_several_lines_of_jsonl_are_named_with_the_remedy(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}, indent=1))
    with pytest.raises(
        DataError, match=r"row 1 of .*broken JSON.*where an object goes on over several lines, call the file"
    ):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_broken_utf16_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16") + b"\x00\xd8\x00")
    errors = texts(tmp_path / "a.jsonl")[1]
    assert len(errors) == 1 and re.search(r"a\.jsonl: broken UTF-16 \(.*\); convert the file to UTF-8", errors[0])


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.txt.gz", "a.zip", "a.tar", "a.txt.xz", "a.7z"])
def test_packed_files_that_are_not_read_are_to_be_unpacked(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"are not read; unpack it"):
        list_files([tmp_path / name])


def test_a_directory_without_documents_says_what_it_holds(tmp_path):
    for name in ("a.json", "b.json", "c.pdf"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"no document in this directory \(passed over: 2 \.json, 1 \.pdf; name files of \.json"
    ):
        list_files([tmp_path])


@pytest.mark.parametrize("packing", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("cut", [5, 40])
def test_a_packed_file_that_is_cut_or_damaged_is_named(tmp_path, packing, cut):
    data = PACK[packing](LAYOUTS["lines.jsonl"].encode())
    path = tmp_path / f"a.jsonl{packing}"
    name = streams.COMPRESSED[packing]
    path.write_bytes(data[:-cut])
    assert re.search(rf"damaged {name} data after row \d \(.*\); fetch the file again", texts(path)[1][0])
    path.write_bytes(b"nothing packed")
    assert re.search(rf"damaged {name} data after row 0", texts(path)[1][0])


BOMB = b'{"text": "' + bytes(200_000_000).replace(b"\0", b"a") + b'"}'
SHAPES = {
    "a line.jsonl": lambda: BOMB, "an array.json": lambda: b"[" + BOMB, "an object.json": lambda: b"\n{\n" + BOMB[1:],
    "a field.csv": lambda: b"text\n" + BOMB, "a quoted field.csv": lambda: b'text\n"' + (b"a" * 999 + b"\n") * 100_000,
    "empty lists.json": lambda: b"[{" + b'"a": [' + b"[]," * 40_000_000, "spaces.json": lambda: b" " * 200_000_000,
    "a line of spaces.jsonl": lambda: b" " * 200_000_000, "blank lines.jsonl": lambda: b"\n" * 200_000_000,
}  # fmt: skip
FAST = {
    ".gz": lambda d: gzip.compress(d, 1), ".zst": zstandard.ZstdCompressor(level=1).compress,
    ".xz": lambda d: lzma.compress(d, preset=0), ".bz2": lambda d: bz2.compress(d, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "packing"), [*[(shape, ".gz") for shape in SHAPES], *[("a line.jsonl", p) for p in FAST if p != ".gz"]]
)
def test_a_row_that_unpacks_to_very_much_is_refused_before_it_fills_the_memory(tmp_path, shape, packing):
    path = tmp_path / f"{shape}{packing}"
    path.write_bytes(FAST[packing](SHAPES[shape]()[:40_000_000]))
    tracemalloc.start()
    try:
        _, errors = texts(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(errors) == 1, errors
    assert re.search(r"a row unpacks to over \d+ MB from [\d,]+ bytes, as no text does; unpack the file", errors[0])
    assert peak < 250_000_000


def test_a_long_row_that_is_text_is_read(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) * 200
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}, ensure_ascii=False).encode()))
    assert [len(t) for t in texts(tmp_path / "a.jsonl.gz")[0]] == [4_000_000] or streams.RATIO < 100


# Tables


def bad_text(values):
    """A column of text, of which some is no UTF-8."""
    column = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), column.buffers())


NAMES = ["a.parquet", "stream.arrow", "file.arrow", "a.feather", "packed.feather", "a.ipc"]


def write_table(path, table):
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=2)
    elif path.stem == "a":
        pa.feather.write_feather(table, path, compression="uncompressed")
    elif path.stem == "packed":
        pa.feather.write_feather(table, path, compression="zstd", chunksize=2)
    else:
        new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_every_container_and_kind_of_text_are_read(tmp_path, name):
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
        column = pa.array(TEXTS, pa.string()).cast(kind)
        write_table(tmp_path / name, pa.table({"text": column}))
        assert texts(tmp_path / name) == (TEXTS, []), kind
        for after in range(8):
            found = read_from(list_files([tmp_path / name]), Position(0, after))
            assert [d.text for d, _ in found] == TEXTS[after:]
    if "parquet" not in name:
        write_table(tmp_path / name, pa.table({"text": pa.array(TEXTS).dictionary_encode()}))
        assert texts(tmp_path / name) == (TEXTS, [])


VALUES = {
    "text that is no UTF-8": ("x", bad_text([b"one", b"caf\xe9", b"three"])),
    "a date beyond 9999": ("x", pa.array([1, 2**31 - 1, 2], pa.date32())),
    "a time beyond 9999": ("x", pa.array([1, 2**60, 2], pa.timestamp("us"))),
    "a time before the year 1": ("x", pa.array([1, -(2**62), 2], pa.timestamp("ms"))),
    "a duration": ("x", pa.array([1, 2**62, 2], pa.duration("s"))),
    "within a list": ("x", pa.ListArray.from_arrays([0, 1, 2, 3], bad_text([b"one", b"caf\xe9", b"three"]))),
    "within a struct": ("x", pa.StructArray.from_arrays([pa.array([1, 2**60, 2], pa.timestamp("us"))], ["when"])),
    "in the text": ("text", bad_text([b"a", b"caf\xe9", b"c"])),
    "in bytes as text": ("text", pa.array([b"a", b"caf\xe9", b"c"])),
}


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_python_cannot_hold_costs_its_row_and_no_other(tmp_path, name, value):
    column, values = VALUES[value]
    if name.endswith("parquet") and pa.types.is_duration(values.type):
        pytest.skip("Parquet has no durations of its own")
    table = pa.table({"text": ["a", "b", "c"]} | {column: values})
    path = tmp_path / name
    write_table(path, table)
    found, errors = texts(path)
    assert found == ["a", "c"]
    assert len(errors) == 1 and re.match(
        rf"row 2 of {re.escape(str(path))}: .*'{column}' holds .*drop the row$", errors[0]
    )
    with pytest.raises(DataError, match=r"row 2 of "):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow"])
def test_what_python_can_hold_or_say_becomes_metadata(tmp_path, name):
    columns = {
        "ns": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
        "even": pa.array([1_700_000_000_000_000_000], pa.timestamp("ns")),
        "clock": pa.array([3_600_000_000_001], pa.time64("ns")),
        "day": pa.array([datetime.date(2024, 2, 29)]),
        "price": pa.array(["1.50"]).cast(pa.decimal128(9, 2)),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "half": pa.array([1.5], pa.float16()),
        "took": pa.array([1_000_000_001], pa.duration("ns")),
    }
    write_table(tmp_path / name, pa.table({"text": ["a"]} | columns))
    [document] = read_documents([tmp_path / name])
    assert document.meta == {
        "ns": "2023-11-14 22:13:20.123456789", "even": "2023-11-14 22:13:20", "clock": "01:00:00.000000001",
        "day": "2024-02-29", "price": "1.50", "map": [["k", 1]], "half": 1.5, "took": "1000000001 ns",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_bytes_are_left_out_of_metadata_unread_and_named(tmp_path, name, caplog, monkeypatch):
    terminal.warn_once.cache_clear()
    picture = pa.StructArray.from_arrays(
        [pa.array([b"\xff\xd8", b"\x89P"]), pa.array(["a.jpg", "b.png"])], ["bytes", "path"]
    )
    write_table(
        tmp_path / name, pa.table({"text": ["a", "b"], "image": picture, "raw": [b"\xff", b"\xfe"], "n": [1, 2]})
    )
    read = []
    value = tables._values
    monkeypatch.setattr(tables, "_values", lambda batch, *rest: read.append(batch.schema.names) or value(batch, *rest))
    with caplog.at_level(logging.WARNING, "arriero"):
        assert [d.meta for d in read_documents([tmp_path / name])] == [{"n": 1}, {"n": 2}]
    assert {tuple(names) for names in read} == {("text", "n")}
    assert caplog.messages == [
        f"{tmp_path / name}: bytes are no metadata, so these columns are left out: 'image', 'raw'"
    ]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_only_the_columns_that_are_asked_for_are_decoded(tmp_path, name):
    table = pa.table(
        {"bad": bad_text([b"\xff", b"\xfe"]), "text": ["a", "b"], "when": pa.array([2**60] * 2, pa.timestamp("us"))}
    )
    write_table(tmp_path / name, table)
    found = list(read_records(tmp_path / name, 0, lambda name, holds_bytes: name == "text"))
    assert [(r.raw, r.error, r.unread) for r in found] == [({"text": t}, None, ("bad", "when")) for t in "ab"]
    none = list(read_records(tmp_path / name, 0, lambda name, holds_bytes: False))
    assert [(r.row, r.raw) for r in none] == [(1, {}), (2, {})]


@pytest.mark.parametrize("name", NAMES)
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    if "feather" in name or "ipc" in name:
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        write_table(tmp_path / name, table)
    with pytest.raises(DataError, match=r"two of its columns are called 'text'; rename or remove one"):
        list(read_documents([tmp_path / name]))


def test_feather_of_version_1_is_named(tmp_path):
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(40))
    with pytest.raises(
        DataError, match=r"Feather of version 1, which is not read; write it as version 2 or as Parquet"
    ):
        list(read_documents([tmp_path / "a.feather"]))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_tables_are_named(tmp_path, name):
    write_table(tmp_path / name, pa.table({"text": TEXTS}))
    whole = (tmp_path / name).read_bytes()
    for data in (whole[:-30], whole[:20], b"nothing", b""):
        (tmp_path / name).write_bytes(data)
        if data == whole[:-30] and name == "stream.arrow":
            continue  # its last batch is whole
        with pytest.raises(DataError, match=r"not readable as (Parquet|an Arrow stream or file) \(|holds no rows"):
            list(read_documents([tmp_path / name]))


def test_a_column_that_unpacks_to_very_much_is_refused(tmp_path):
    table = pa.table({"text": ["a" * 40_000_000]})
    pa.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(
        DataError, match=r"the column 'text' unpacks from [\d,]+ to 40,000,\d+ bytes behind row 0, as no text"
    ):
        list(read_documents([tmp_path / "a.parquet"]))


def test_large_rows_of_tables_are_held_a_few_at_a_time(tmp_path):
    pa.parquet.write_table(
        pa.table({"text": [chr(97 + i) * 5_000_000 for i in range(20)]}), tmp_path / "a.parquet", compression="none"
    )
    tracemalloc.start()
    try:
        for document in read_documents([tmp_path / "a.parquet"]):
            assert len(document.text) == 5_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000  # 100 MB in all


def test_fine_tuning_rows_are_read_from_the_same_files(tmp_path):
    row = {"prompt": "How many legs?", "completion": "Four."}
    (tmp_path / "a.json.xz").write_bytes(lzma.compress(json.dumps([row, row], indent=1).encode("utf-16")))
    pa.feather.write_feather(pa.table({key: [value] for key, value in row.items()}), tmp_path / "b.feather")
    assert len(list(read_conversations(tmp_path))) == 3
