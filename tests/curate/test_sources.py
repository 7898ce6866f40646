"""Every kind of source gives its documents, in one order, resumable at each of them; what is broken is named."""

import datetime
import gzip
import io
import itertools
import json
import os
import re
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from arriero.curate.document import Document
from arriero.curate.sources import Position, list_files, read_documents, read_from
from arriero.errors import DataError

TEXTS = [f"Llama number {i} hums.\nIt has {i} crias." for i in range(7)]
PAGE = """<html><head><title>Llamas</title><meta charset="utf-8"></head>
<body><nav><a href="/">Home</a> <a href="/x">Shop</a>
</nav><main><article><h1>Of llamas</h1><p>{}</p><p>{}</p></article></main><footer>Copyright</footer></body></html>"""
SENTENCE = "The llama is a domesticated South American camelid, widely used as a meat and pack animal. "


def rows():
    return [{"text": text, "id": f"doc-{i}", "url": f"https://x.org/{i}", "likes": i} for i, text in enumerate(TEXTS)]


def jsonl(data=None):
    return "".join(json.dumps(row) + "\n" for row in (data or rows())).encode()


def warc(pages, status=200, kind="text/html; charset=utf-8", header=""):
    out = io.BytesIO()
    for i, page in enumerate(pages):
        body = page if isinstance(page, bytes) else page.encode()
        head = f"HTTP/1.1 {status} OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{header}\r\n"
        http = head.encode() + body
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i}>\r\nWARC-Target-URI: https://x.org/{i}\r\n"
            f"WARC-Date: 2024-03-0{i + 1}T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
            f"Content-Length: {len(http)}\r\n\r\n"
        )
        out.write(gzip.compress(head.encode() + http + b"\r\n\r\n"))
    return out.getvalue()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json"])
def test_rows_of_every_container_give_the_same_documents(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pa.parquet.write_table(pa.Table.from_pylist(rows()), path, row_group_size=3)
    elif name.endswith("json"):
        path.write_text(json.dumps(rows()))
    else:
        pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(path.suffix[1:], bytes)
        path.write_bytes(pack(jsonl()))
    assert list(read_documents([path])) == [
        Document(text, f"doc-{i}", "a", f"https://x.org/{i}", "", {"likes": i}) for i, text in enumerate(TEXTS)
    ]


def test_a_row_without_an_id_is_named_by_file_and_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"content": "one", "source": "wiki"}, {"content": "two"}]))
    first, second = read_documents([tmp_path / "a.jsonl"], "content")
    assert (first.id, first.source) == ("a.jsonl:1", "wiki")
    assert (second.id, second.source) == ("a.jsonl:2", "a")


def mixed(tmp_path):
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "z.txt").write_text("A plain text.")
    (root / "b.md").write_text("# Title\n")
    (root / "c.py").write_bytes("# coding: latin-1\nname = 'José'\n".encode("latin-1"))
    (root / "d.jsonl").write_bytes(jsonl())
    pa.parquet.write_table(pa.Table.from_pylist(rows()), root / "e.parquet", row_group_size=2)
    table = pa.Table.from_pylist(rows())
    with pa.OSFile(str(root / "e2.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    (root / "f.html").write_text(PAGE.format(SENTENCE * 3, SENTENCE * 2))
    (root / "g.warc.gz").write_bytes(warc([PAGE.format(SENTENCE * n, SENTENCE) for n in (2, 3, 5)]))
    (root / "package.json").write_text('{"name": "not a document"}')
    (root / ".hidden.txt").write_text("no")
    return root


def test_a_directory_gives_all_its_documents_sorted_by_path(tmp_path):
    found = list(read_documents([mixed(tmp_path)]))
    names = [document.id for document in found]
    assert names == [
        "corpus/b.md", "corpus/c.py", *[f"doc-{i}" for i in range(7)] * 3, "corpus/f.html",
        "urn:uuid:0", "urn:uuid:1", "urn:uuid:2", "corpus/sub/z.txt",
    ]  # fmt: skip
    assert found[1] == Document("# coding: latin-1\nname = 'José'\n", "corpus/c.py", "code")
    assert found[-2].url == "https://x.org/2" and found[-2].date == "2024-03-03T00:00:00Z"


@pytest.mark.parametrize("html", ["resiliparse", "trafilatura"])
def test_html_gives_the_main_text_without_menus(tmp_path, html):
    (tmp_path / "f.html").write_text(PAGE.format(SENTENCE * 3, SENTENCE * 2))
    [document] = read_documents([tmp_path / "f.html"], html=html)
    assert SENTENCE.strip() in document.text
    assert "Shop" not in document.text and "Copyright" not in document.text


def test_warc_responses_that_failed_or_are_pictures_are_no_documents(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(warc(["gone"], status=404) + warc(["png"], kind="image/png"))
    assert list(read_documents([tmp_path / "a.warc.gz"])) == []


ENGLISH = SENTENCE * 9 + "It had lunch at the café."


@pytest.mark.parametrize("kind", ["html", "warc", "plain warc", "wet"])
def test_utf8_with_a_single_character_that_is_not_ascii_is_read_as_utf8(tmp_path, kind):
    page = f"<html><body><main><p>{ENGLISH}</p></main></body></html>"
    path = tmp_path / "a.warc.gz"
    if kind == "html":
        path = tmp_path / "a.html"
        path.write_text(page)
    elif kind == "wet":
        path.write_bytes(wet(ENGLISH.encode()))
    else:
        path.write_bytes(warc([ENGLISH], kind="text/plain") if kind == "plain warc" else warc([page], kind="text/html"))
    [document] = read_documents([path])
    assert document.text.strip() == ENGLISH


def wet(body):
    head = f"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    return gzip.compress(head.encode() + body + b"\r\n\r\n")


def test_a_wet_text_is_utf8_and_what_is_not_is_replaced(tmp_path):
    (tmp_path / "a.warc.wet.gz").write_bytes(wet("café ".encode() + b"caf\xe9"))
    assert [d.text for d in read_documents([tmp_path / "a.warc.wet.gz"])] == ["café caf\ufffd"]


@pytest.mark.parametrize(
    ("charset", "declared", "encoding"),
    [
        ("iso-8859-2", "", "iso-8859-2"),
        ("iso-8859-2", '<meta charset="utf-8">', "iso-8859-2"),  # the header goes before the page
        ("", '<meta charset="iso-8859-2">', "iso-8859-2"),
        ("", '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-2">', "iso-8859-2"),
        ("", '<?xml version="1.0" encoding="iso-8859-2"?>', "iso-8859-2"),
        ("nonsense", '<meta charset="iso-8859-2">', "iso-8859-2"),  # a codec that is none, and one for other things
        ("hex", "", "utf-8"),
        ("utf-8", '<meta charset="iso-8859-2">', "iso-8859-2"),  # its bytes do not decode
        ("iso-8859-2", '<meta charset="iso-8859-2">', "utf-8-sig"),  # a mark goes before all
        ("", '<meta charset="utf-16">', "utf-8"),
        ("", "", "utf-16"),
    ],
)
def test_a_page_is_read_in_the_encoding_that_it_names(tmp_path, charset, declared, encoding):
    page = f"{declared}<html><body><main><p>{SENTENCE * 3} Łódź.</p></main></body></html>".encode(encoding)
    kind = f"text/html; charset={charset}" if charset else "text/html"
    (tmp_path / "a.warc.gz").write_bytes(warc([page], kind=kind))
    [document] = read_documents([tmp_path / "a.warc.gz"])
    assert document.text.strip().endswith("Łódź.")


def test_a_page_of_utf8_with_a_broken_byte_keeps_its_other_characters(tmp_path):
    page = (
        f"<html><body><main><p>{'Zażółć gęślą jaźń, powiedział król. ' * 9}".encode() + b"\xc5</p></main></body></html>"
    )
    (tmp_path / "a.warc.gz").write_bytes(warc([page]))
    [document] = read_documents([tmp_path / "a.warc.gz"])
    assert document.text.startswith("Zażółć gęślą jaźń") and document.text.strip().endswith("\ufffd")


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Transfer-Encoding: chunked", "Content-Encoding: foo"])
def test_a_response_that_is_not_packed_as_its_header_says_costs_no_other(tmp_path, header):
    pages = ["plain", gzip.compress(b"packed"), b"\x1f\x8b\x08broken", b"caf\xe9 cr\xe8me br\xfbl\xe9e", "last"]
    (tmp_path / "a.warc.gz").write_bytes(warc(pages, kind="text/plain", header=header + "\r\n"))
    errors = []
    found = [d.text for d in read_documents([tmp_path / "a.warc.gz"], on_error=errors.append)]
    kept = ["packed"] if "gzip" in header else []
    assert found == ["plain", *kept, "café crème brûlée", "last"]
    message = r"row 3 of .*a\.warc\.gz: the body is not what its header says \(.*-Encoding: .*\); remove the record"
    assert re.fullmatch(message, str(errors[-1]))


def chunks(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:], b""))


def test_a_response_is_unpacked_as_far_as_it_is_packed(tmp_path):
    text = b"Add a page of text that is long enough."
    packed = [text, chunks(text), gzip.compress(text), chunks(gzip.compress(text)), chunks(text)[:-20], b"\x02 of text"]
    header = "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
    (tmp_path / "a.warc.gz").write_bytes(warc(packed, kind="text/plain", header=header))
    errors = []
    found = [d.text for d in read_documents([tmp_path / "a.warc.gz"], on_error=errors.append)]
    assert found == [*[text.decode()] * 4, "\x02 of text"]
    assert len(errors) == 1 and "row 5" in str(errors[0])


def test_reading_resumes_after_any_document(tmp_path):
    files = list_files([mixed(tmp_path)])
    everything = list(read_from(files))
    for number, (_, position) in enumerate(everything):
        assert list(read_from(files, position)) == everything[number + 1 :]
    assert list(read_from(files, Position(0, 0))) == everything


def test_the_standard_library_is_a_corpus_of_code_and_prose():
    found = list(read_documents(["stdlib"]))
    assert {"stdlib/abc.py", "stdlib/json/decoder.py"} <= {d.id for d in found if d.source == "code"}
    assert "stdlib/topics/assert" in {d.id for d in found if d.source == "prose"}
    assert not [d.id for d in found if "/test/" in d.id or "idlelib" in d.id or "site-packages" in d.id]
    assert len({d.id for d in found}) == len(found)


def test_a_curated_directory_is_read_by_its_manifest(tmp_path):
    (tmp_path / "shard-1.jsonl").write_bytes(jsonl([{"text": "b", "id": "2", "meta": '{"n": 3}'}]))
    (tmp_path / "shard-0.jsonl").write_bytes(jsonl([{"text": "a", "id": "1"}]))
    (tmp_path / "stray.jsonl").write_bytes(jsonl([{"text": "c"}]))
    (tmp_path / "manifest.json").write_text(
        json.dumps({"format": "arriero curated corpus 1", "shards": [{"file": f"shard-{i}.jsonl"} for i in (0, 1)]})
    )
    assert [(d.text, d.meta) for d in read_documents([tmp_path])] == [("a", {}), ("b", {"n": 3})]
    (tmp_path / "shard-1.jsonl").unlink()
    with pytest.raises(DataError, match=r"the manifest lists shard-1\.jsonl, which is missing; copy it again"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize("shard", ["s" * 201, "s" * 300, "a/b.jsonl", "..", 3, None], ids=repr)
def test_a_manifest_of_names_that_are_no_files_beside_it_is_refused(tmp_path, shard):
    manifest = {"format": "arriero curated corpus 1", "shards": [{"file": shard}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=r"manifest\.json: it lists the shard .*; each is a file beside it: remove it, or"
    ):
        list(read_documents([tmp_path]))


def curation(root, texts):
    """What `arriero curate` leaves: shards and what is said of them."""
    root.mkdir(parents=True)
    (root / "shard-00000.jsonl").write_bytes(jsonl([{"text": text} for text in texts]))
    (root / "report.html").write_text(PAGE.format(SENTENCE * 3, SENTENCE))
    (root / "decontamination.jsonl").write_bytes(jsonl([{"text": "no document"}]))
    manifest = {"format": "arriero curated corpus 1", "shards": [{"file": "shard-00000.jsonl"}]}
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_curations_below_a_directory_are_read_by_their_manifests(tmp_path):
    root = tmp_path / "corpora"
    curation(root / "b", ["two", "three"])
    curation(root / "c" / "d", ["four"])
    curation(root / "e", ["unfinished"])
    (root / "e" / "manifest.json").unlink()
    (root / "e" / ".work").mkdir()
    (root / "e" / ".work" / "plan.json").touch()
    (root / "f").mkdir()
    (root / "f" / "manifest.json").write_text('{"name": "a web app"}')
    (root / "f" / "f.txt").write_text("five")
    (root / "a.txt").write_text("one")
    assert [d.text for d in read_documents([root / "f"])] == ["five"]
    passed_over = Counter()
    list_files([root], passed_over)
    assert passed_over == {"unfinished curations": 1, ".json": 1}
    assert {d.id: d.text for d in read_documents([root])} == {
        "corpora/a.txt": "one",
        "corpora/b/shard-00000.jsonl:1": "two",
        "corpora/b/shard-00000.jsonl:2": "three",
        "corpora/c/d/shard-00000.jsonl:1": "four",
        "corpora/f/f.txt": "five",
    }
    assert {d.source for d in read_documents([root])} == {"corpora"}
    with pytest.raises(DataError, match=r"e: a curation that is not finished; run it again to its end"):
        list_files([root / "e"])
    (root / "b" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"b/manifest\.json: not valid JSON .*; remove it, or curate again"):
        list_files([root])


def test_what_is_no_file_in_a_directory_is_passed_over_and_counted(tmp_path):
    root = tmp_path / "crawl"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").write_text("a")
    (root / "linked.txt").symlink_to("sub/a.txt")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "broken.txt").symlink_to("nowhere.txt")
    os.mkfifo(root / "pipe.jsonl")
    passed_over = Counter()
    assert [file.name for file in list_files([root], passed_over)] == ["crawl/linked.txt", "crawl/sub/a.txt"]
    assert passed_over == {"links to directories": 1, "broken links": 1, "pipes or devices": 1}
    with pytest.raises(DataError, match=r"pipe\.jsonl: a pipe or device, which cannot be read twice"):
        list_files([root / "pipe.jsonl"])


def test_endings_are_compared_in_lower_case_and_without_their_compression(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(jsonl([{"text": "a"}])))
    (tmp_path / "B.TXT").write_text("b")
    (tmp_path / "C.PY").write_bytes("# coding: latin-1\n# José\n".encode("latin-1"))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(b'{"text": "d"}'))  # as C4 is published
    (tmp_path / "d.json").write_bytes(b'[{"text": "no"}]')
    (tmp_path / "e.CSV").write_text("text\nno\n")
    passed_over = Counter()
    list_files([tmp_path], passed_over)
    assert passed_over == {".json": 1, ".csv": 1}
    assert [d.text for d in read_documents([tmp_path])] == ["a", "b", "# coding: latin-1\n# José\n", "d"]
    assert [d.text for d in read_documents([tmp_path / "e.CSV"])] == ["no"]


def test_a_file_whose_name_is_not_utf8_has_an_id_that_is(tmp_path):
    try:
        path = tmp_path / os.fsdecode(b"caf\xe9.txt")
        path.write_text("hello")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert [d.id for d in read_documents([tmp_path])] == [f"{tmp_path.name}/caf\\xe9.txt"]
    assert [d.id for d in read_documents([path])] == ["caf\\xe9.txt"]


def test_two_directories_of_one_name_give_distinct_ids(tmp_path):
    for parent in "xy":
        (tmp_path / parent / "data").mkdir(parents=True)
        (tmp_path / parent / "data" / "a.txt").write_text(parent)
    assert [d.id for d in read_documents([tmp_path / "x/data", tmp_path / "y/data"])] == ["data/a.txt", "data~2/a.txt"]


def test_lone_surrogates_become_replacement_characters_as_in_rows_of_conversations(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "bad \\ud800 pair"}\n')
    [document] = read_documents([tmp_path / "a.jsonl"])
    assert document.text == "bad \ufffd pair"


def test_nan_in_a_cell_is_no_id(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": NaN, "url": NaN, "source": NaN}\n')
    [document] = read_documents([tmp_path / "a.jsonl"])
    assert (document.id, document.source, document.url) == ("a.jsonl:1", "a", "")


def test_columns_become_what_json_and_utf8_can_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "\\ud800": 1, "no": null, "meta": {"x": ["\\ud800"]}}\n')
    [document] = read_documents([tmp_path / "a.jsonl"])
    assert document.meta == {"\ufffd": 1, "x": ["\ufffd"]}
    when = datetime.datetime(2020, 1, 2)
    pa.parquet.write_table(pa.Table.from_pylist([{"text": "a", "meta": {"when": when}}]), tmp_path / "a.parquet")
    [document] = read_documents([tmp_path / "a.parquet"])
    assert document.meta == {"when": "2020-01-02 00:00:00"}


@pytest.mark.parametrize("depth", [101, 600, 100_000])
@pytest.mark.parametrize("column", ["x", "meta"])
def test_a_row_that_is_nested_too_deeply_is_passed_over(tmp_path, column, depth):
    deep = "[" * depth + "]" * depth
    meta = json.dumps({"y": 0}).replace("0", deep)
    value = {"x": deep, "meta": json.dumps(meta)}[column]  # meta is a text, as in shards
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "b", "{column}": {value}}}\n{{"text": "c"}}\n')
    errors = []
    assert [d.text for d in read_documents([tmp_path / "a.jsonl"], on_error=errors.append)] == ["a", "c"]
    [error] = errors
    assert re.search(r"row 2 of .*a\.jsonl: .* nested .*deep.*; flatten it or drop the (row|line)", str(error))


def test_a_null_text_in_parquet_is_called_that(tmp_path):
    pa.parquet.write_table(
        pa.Table.from_pylist([{"text": "a", "d": 1}, {"text": None, "d": 2}]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=r"row 2 of .*a\.parquet: 'text' is null or NaN; fill it or drop the row"):
        list(read_documents([tmp_path / "a.parquet"]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"text,id\na,1\nx,2,3\nb,4\n", r"row 2 of .*: it has more fields than the header's 2; quote"),
        ("a.csv", b"text,id\na,1\nx\nb,4\n", r"row 2 of .*: it has fewer fields than the header's 2; quote"),
        ("a.csv", b'text,id\na,1\n"x"y,2\nb,4\n', r"row 2 of .*: broken CSV: .*; write it as UTF-8 with quotes"),
        ("a.csv", b"text,id\na,1\ncaf\xe9,2\nb,4\n", r"row 2 of .*: broken CSV: 'utf-8' codec can't decode"),
        ("a.tsv", b"text\tid\na\t1\nx\nb\t4\n", r"row 2 of .*: it has fewer fields than the header's 2; quote"),
        ("a.json", b'[{"text": "a"}, 5, {"text": "b"}]', r"row 2 of .*: expected a JSON object, found int"),
    ],
)
def test_one_bad_row_of_a_table_costs_no_other(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    errors = []
    assert [d.text for d in read_documents([tmp_path / name], on_error=errors.append)] == ["a", "b"]
    assert len(errors) == 1 and re.search(message, str(errors[0]))
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path / name]))
    files = list_files([tmp_path / name])
    assert [d.text for d, _ in read_from(files, Position(0, 2))] == ["b"]


BROKEN = {
    "broken JSON": ('{"text": "a"}\n{"text": \n{"text": "c"}\n', r"row 2 of .*a\.jsonl: broken JSON: .*; mend or drop"),
    "no text": (
        '{"text": "a"}\n{"body": "b", "id": 3}\n{"text": "c"}\n',
        r"row 2 of .*a\.jsonl: no column 'text' \(there are: 'body', 'id'\); name the text's with --text-key",
    ),
    "null": (
        '{"text": "a"}\n{"text": null}\n{"text": "c"}\n',
        r"row 2 of .*a\.jsonl: 'text' is null or NaN; fill it or drop the row",
    ),
    "no string": (
        '{"text": "a"}\n{"text": 7}\n{"text": "c"}\n',
        r"row 2 of .*a\.jsonl: 'text' is of type int; it must be a text",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named_or_passed_over(tmp_path, case):
    text, message = BROKEN[case]
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_documents([path]))
    errors = []
    assert [d.text for d in read_documents([path], on_error=errors.append)] == ["a", "c"]
    assert len(errors) == 1


def test_files_that_cannot_be_read_are_named_or_passed_over(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl())[:-20])
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl())[:-5])
    (tmp_path / "d.warc.gz").write_bytes(warc([PAGE.format(SENTENCE * 4, SENTENCE * 2)] * 2)[:-200])
    (tmp_path / "e.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "f.txt").write_text("good")
    errors = []
    found = list(read_documents([tmp_path], on_error=errors.append))
    assert found[-1].text == "good"
    for error, place in itertools.zip_longest(errors, ["a.txt", "b.jsonl.gz", "c.jsonl.zst", "d.warc.gz", "e.parquet"]):
        assert place in str(error)
    assert "not UTF-8 text" in str(errors[0]) and "convert it" in str(errors[0])


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
@pytest.mark.parametrize("packed", ["each record", "the file", "no"])
def test_a_crawl_that_is_cut_anywhere_is_named_whatever_it_is_called(tmp_path, packed, name):
    whole = warc([PAGE.format(SENTENCE * n, SENTENCE) for n in (2, 3, 5)])
    ends = {len(whole)}
    if packed == "each record":
        ends |= {match.start() for match in re.finditer(b"\x1f\x8b\x08", whole)}
    elif packed == "the file":
        whole = gzip.compress(gzip.decompress(whole))
        ends = {len(whole)}
    else:
        whole = gzip.decompress(whole)
        ends = {match.end() for match in re.finditer(b"\r\n\r\n(?=WARC/|$)", whole)}
    path = tmp_path / name
    path.write_bytes(whole)
    assert len(list(read_documents([path]))) == 3
    for size in range(1, len(whole), 31):
        path.write_bytes(whole[:size])
        errors = []
        assert len(list(read_documents([path], on_error=errors.append))) < 3
        assert len(errors) == (size not in ends), size


def test_a_crawl_without_a_record_is_refused_and_what_is_passed_over_is_counted(tmp_path):
    (tmp_path / "a.warc.gz").touch()
    with pytest.raises(DataError, match=r"a\.warc\.gz: the file holds no record; fetch it again or remove it"):
        list(read_documents([tmp_path]))
    for name in ("b.pdf", "c.pdf", "d.json", "LICENCE"):
        (tmp_path / name).touch()
    passed_over = Counter()
    assert [file.path.name for file in list_files([tmp_path], passed_over)] == ["a.warc.gz"]
    assert passed_over == {".pdf": 2, ".json": 1, "without an ending": 1}


def test_a_mistyped_directory_is_called_missing_besides_no_hub_data_set(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(
        DataError, match=r"^no/where: no such file or directory; to read it as a Hub data set, this needs"
    ):
        list_files(["no/where"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: p / "nothing.jsonl",
            r"nothing\.jsonl: no such file or directory; give a file, a directory, 'stdlib'",
        ),
        (lambda p: p, r"no document in this directory; put \.txt"),
        (lambda p: (p / "a.docx").touch() or p / "a.docx", r"files ending '\.docx' are not read; rename plain text"),
        (lambda p: (p / "a.txt.gz").touch() or p / "a.txt.gz", r"files ending '\.txt\.gz' are not read; unpack it"),
    ],
)
def test_sources_that_are_none_are_refused(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        list_files([make(tmp_path)])
