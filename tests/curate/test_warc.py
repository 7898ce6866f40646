"""Web archives as crawlers write them: each page is read as warcio reads it, and what is passed over is counted."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections import Counter

import brotli
import pytest
import zstandard
from warcio.archiveiterator import ArchiveIterator

from arriero.curate.config import CurateConfig
from arriero.curate.engine import curate
from arriero.curate.report import funnel_table
from arriero.curate.sources import START, list_files, read_from
from arriero.curate.warc import MOST, mime_type, parse_http, unpacked
from arriero.errors import DataError

CRLF, LF = b"\r\n", b"\n"
OK, HTML = b"HTTP/1.1 200 OK", b"Content-Type: text/html; charset=utf-8"


def page(i):
    return b"<html><body><main><p>Page %d: the llama is a South American camelid.</p></main></body></html>" % i


def record(
    i, head=(OK, HTML), body=None, eol=CRLF, http_eol=CRLF, kind=b"response", content=b"application/http", **more
):
    data = (http_eol.join([*head, b"", b""]) if head else b"") + (page(i) if body is None else body)
    lines = [
        more.get("version", b"WARC/1.0"), b"WARC-Type: " + kind, b"WARC-Record-ID: <urn:uuid:%d>" % i,
        b"WARC-Date: 2024-01-01T00:00:00Z", b"WARC-Target-URI: http://example.org/%d" % i, *more.get("extra", ()),
        b"Content-Type: " + content, b"Content-Length: %d" % len(data), b"", b"",
    ]  # fmt: skip
    return eol.join(lines) + data + more.get("between", eol * 2)


def read(path):
    """Documents by number, what was passed over by reason, and errors."""
    passed, errors = Counter(), []
    found = read_from(
        list_files([path]), START, on_error=errors.append, on_passed=lambda passed_: passed.update([passed_.reason])
    )
    return {document.id.removeprefix("urn:uuid:"): document for document, _ in found}, passed, [str(e) for e in errors]


def chunked(body, eol=CRLF):
    parts = (body[:17], body[17:], b"")
    return b"".join(b"%x" % len(part) + eol + part + eol for part in parts)


def packed(name, body):
    return {
        "gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress,
        "zstd": zstandard.ZstdCompressor().compress,
    }[name](body)  # fmt: skip


ARCHIVES = {
    "CRLF": {},
    "LF in WARC headers": {"eol": LF},
    "LF in HTTP heads": {"http_eol": LF},
    "LF everywhere": {"eol": LF, "http_eol": LF},
    "one line end between records": {"between": CRLF},
    "three between records": {"between": CRLF * 3},
    "WARC 0.18": {"version": b"WARC/0.18"},
    "WARC 1.1": {"version": b"WARC/1.1"},
    "a folded WARC header": {"extra": (b"X-Long: a", b"  b")},
    "a folded HTTP header": {"head": (OK, b"Content-Type: text/html;", b"\tcharset=utf-8")},
    "no Content-Type": {"head": (OK, b"Server: x")},
    "no status line": {"head": (HTML,)},
    "a status without a reason": {"head": (b"HTTP/1.1 200", HTML)},
    "HTTP/2": {"head": (b"HTTP/2 200", b"content-type: text/html")},
    "spaces around colons": {"head": (OK, b"Content-Type : text/html ")},
    "a header that is none": {"head": (OK, b"!!! broken", HTML)},
    "Content-Type in capitals": {"head": (OK, b"CONTENT-TYPE: TEXT/HTML")},
    "a resource": {"head": (), "kind": b"resource", "content": b"text/html"},
    "application/http; msgtype=response": {"content": b"application/http; msgtype=response"},
}


@pytest.mark.parametrize("packing", ["", ".gz", "whole.gz"])
@pytest.mark.parametrize("archive", ARCHIVES)
def test_pages_are_read_however_their_crawler_wrote_them(tmp_path, archive, packing):
    records = [record(i, **(ARCHIVES[archive] if i != 1 or archive == "CRLF" else {})) for i in range(3)]
    data = b"".join(gzip.compress(r) for r in records) if packing == ".gz" else b"".join(records)
    path = tmp_path / f"a.warc{packing[-3:]}"
    path.write_bytes(gzip.compress(data) if packing == "whole.gz" else data)
    documents, passed, errors = read(path)
    assert [d.text.strip()[:7] for d in documents.values()] == ["Page 0:", "Page 1:", "Page 2:"]
    assert not passed and not errors
    by_warcio = [r.content_stream().read() for r in ArchiveIterator(io.BytesIO(b"".join(records)))]
    assert by_warcio == [page(0), page(1), page(2)]


@pytest.mark.parametrize("eol", [CRLF, LF])
@pytest.mark.parametrize("name", ["", "gzip", "x-gzip", "deflate", "br", "zstd", "gzip, br"])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_bodies_are_unpacked(tmp_path, name, in_chunks, eol):
    body = page(5)
    for encoding in filter(None, name.split(", ")):
        body = packed(encoding, body)
    head = [OK, HTML, *([b"Content-Encoding: " + name.encode()] if name else [])]
    if in_chunks:
        head, body = [*head, b"Transfer-Encoding: chunked"], chunked(body, eol)
    path = tmp_path / "a.warc"
    path.write_bytes(record(5, head, body, http_eol=eol))
    documents, _, errors = read(path)
    assert [d.text.strip()[:7] for d in documents.values()] == ["Page 5:"] and not errors
    if name in ("", "gzip", "deflate") and not (in_chunks and eol == LF):  # what warcio can
        by_warcio = next(iter(ArchiveIterator(io.BytesIO(path.read_bytes()))))
        assert by_warcio.content_stream().read() == page(5)


def test_bare_deflate_and_gzip_of_several_members_are_unpacked():
    bare = zlib.compressobj(wbits=-15)
    data = bare.compress(page(1)) + bare.flush()
    assert unpacked(data, {"content-encoding": "deflate"}) == page(1)
    assert unpacked(gzip.compress(b"one ") + gzip.compress(b"two"), {"content-encoding": "gzip"}) == b"one two"


BOMBS = {
    "gzip": lambda: gzip.compress(bytes(MOST + 1)),
    "deflate": lambda: zlib.compress(bytes(MOST + 1)),
    "br": lambda: brotli.compress(bytes(MOST + 1), quality=1),
    "zstd": lambda: zstandard.ZstdCompressor().compress(bytes(MOST + 1)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_body_that_unpacks_to_too_much_is_named_and_costs_no_other(tmp_path, name):
    path = tmp_path / "a.warc"
    bomb = record(0, (OK, HTML, b"Content-Encoding: " + name.encode()), BOMBS[name]())
    path.write_bytes(bomb + record(1))
    documents, _, errors = read(path)
    assert list(documents) == ["1"]
    assert errors == [
        f"row 1 of {path}: its body unpacks to more than 16,000,000 bytes, which is no page; remove the record"
    ]


def test_a_record_that_is_too_long_is_named_and_costs_no_other(tmp_path):
    path = tmp_path / "a.warc.gz"
    path.write_bytes(gzip.compress(record(0, body=bytes(MOST))) + gzip.compress(record(1)))
    documents, _, errors = read(path)
    assert list(documents) == ["1"]
    assert errors[0].startswith(f"row 1 of {path}: it has 16,000,0") and errors[0].endswith(
        "no page; remove the record"
    )


PASSED = [
    record(0, kind=b"warcinfo", content=b"application/warc-fields", head=()),
    record(1, kind=b"request", head=(b"GET / HTTP/1.1",), body=b""),
    record(2, kind=b"revisit"),
    record(3, kind=b"metadata", content=b"application/warc-fields", head=()),
    record(4, (b"HTTP/1.1 404 Not Found", HTML)),
    record(5, (b"HTTP/1.1 404", HTML)),
    record(6, (b"HTTP/1.0 301 Moved", HTML)),
    record(7, (OK, b"Content-Type: image/PNG")),
    record(8, (OK, b"Content-Type: application/pdf; x=y")),
    record(9, body=b""),
    record(10, (OK,), body=b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    record(11, head=(), kind=b"resource", content=b"image/gif"),
    record(12, head=(), content=b"text/dns", body=b"20240101 example.org. IN A 10.0.0.1"),
]
REASONS = {
    "record of type warcinfo": 1, "record of type request": 1, "record of type revisit": 1,
    "record of type metadata": 1,
    "status 404": 2, "status 301": 1, "content type image/png": 1, "content type application/pdf": 1, "empty body": 1,
    "content type application/octet-stream": 1, "content type image/gif": 1, "content type text/dns": 1,
}  # fmt: skip


def test_what_is_passed_over_is_counted_by_reason(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"".join([*PASSED, record(99)]))
    documents, passed, errors = read(tmp_path / "a.warc")
    assert list(documents) == ["99"] and passed == REASONS and not errors


@pytest.mark.parametrize("workers", [1, 2])
def test_a_curation_says_what_it_passed_over(tmp_path, workers):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("a", "b"):
        (raw / f"{name}.warc").write_bytes(b"".join([*PASSED, *(record(i) for i in range(90, 95))]))
    config = CurateConfig(
        sources=(str(raw),), out=str(tmp_path / "out"), steps=("normalise",), part_mb=0.001, workers=workers
    )
    manifest = curate(config)
    assert manifest["documents"] == 10 and manifest["passed_over"] == {k: 2 * n for k, n in REASONS.items()}
    assert next(iter(manifest["passed_over"])) == "status 404"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["passed_over"] == manifest["passed_over"]
    assert "4 status 404" in (tmp_path / "out/report.html").read_text()
    assert "passed over: 4 status 404, 2 content type application/octet-stream" in str(funnel_table(manifest).caption)


@pytest.mark.parametrize(
    ("said", "data", "kind"),
    [
        ("", b"\n <!DOCTYPE html><p>", "text/html"),
        ("", b"\xef\xbb\xbf<HTML>", "text/html"),
        ("", b"<p>x", "text/html"),
        ("", b"<pre>x", "text/plain"),
        ("", b"<?xml version='1.0'?>", "text/xml"),
        ("", b"plain words", "text/plain"),
        ("", b"\xfe\xff\0a", "text/plain"),
        ("", b"GIF89a\x01\0", "application/octet-stream"),
        ("*/*", b"<b>x", "text/html"),
        ("unknown/unknown", b"<b>x", "text/html"),
        ("nonsense", b"<b>x", "text/html"),
        ("Text/HTML;charset=x", b"plain", "text/html"),
    ],
)
def test_a_type_that_is_not_said_is_found_in_the_body(said, data, kind):
    assert mime_type(said, data)[0] == kind


@pytest.mark.parametrize(
    ("data", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nx", 200, b"x"),
        (b"HTTP/1.1 200 OK\nA: b\n\nx\n\ny", 200, b"x\n\ny"),
        (b"HTTP/1.1 200 OK\r\nA: b\n\r\nx", 200, b"x"),
        (b"http/1.0 404\n\n", 404, b""),
        (b"A: b\n\nx", None, b"x"),
        (b"<html>A: b\n\nx", None, b"<html>A: b\n\nx"),
        (b"HTTP/1.1 200 OK\r\nA: b", 200, b""),
        (b"", None, b""),
    ],
)
def test_heads_end_at_the_first_blank_line_whatever_it_is_made_of(data, status, body):
    found = parse_http(data)
    assert (found[0], found[2]) == (status, body)


def test_an_archive_whose_last_record_is_whole_is_not_called_cut(tmp_path):
    path = tmp_path / "a.warc"
    whole = record(0) + record(1)
    path.write_bytes(whole.removesuffix(CRLF * 2))
    documents, _, errors = read(path)
    assert list(documents) == ["0", "1"] and not errors
    path.write_bytes(whole + record(2)[:40])
    documents, _, errors = read(path)
    assert list(documents) == ["0", "1"]
    assert len(errors) == 1 and "the file ends within" in errors[0]


def test_an_encoding_that_is_unknown_is_named():
    with pytest.raises(DataError, match=r"the body is not what its header says \(Content-Encoding: foo: unknown\)"):
        unpacked(b"\x01\xff\xfe", {"content-encoding": "foo"})


@pytest.mark.parametrize("digits", ["9" * 20, "9" * 25])
def test_a_length_beyond_every_file_is_named(tmp_path, digits):
    path = tmp_path / "a.warc"
    last = re.sub(rb"(?m)^Content-Length: \d+", b"Content-Length: " + digits.encode(), record(1))
    path.write_bytes(record(0) + last)
    documents, _, errors = read(path)
    assert "0" in documents
    [error] = errors
    assert "a.warc: the file ends within a record, after record" in error
