"""Web archives: which records are documents, and what lies in an HTTP response.

    response      its body, where the status is 200 and the type HTML or plain text
    resource      its content, likewise
    conversion    its text, in UTF-8, as WET files have it
    others        none; a record that is passed over has a reason, so that they can be counted

fastwarc finds the records; its quirks mode takes line ends of LF and what should not stand between records. HTTP heads
are read here as browsers read them, for crawlers store what servers sent: LF line ends, folded lines, no status line,
no Content-Type (the body tells, as the MIME Sniffing Standard says), packed bodies, of which the crawler may have
undone one encoding or all. Nothing may be longer than `MOST` bytes, or unpack to more.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from arriero.errors import DataError, require

MOST = 16_000_000  # bytes of a record, packed or not; crawlers cut pages at one to five million
WEB_TEXT = ("text/html", "application/xhtml+xml", "text/plain")


class PassedOver(NamedTuple):
    """A record that is no document."""

    reason: str


class Content(NamedTuple):
    """What a record holds, HTML or plain text, and the encoding that its header names."""

    data: bytes
    is_html: bool
    charset: str | None


def content_of(record: Any) -> Content | PassedOver:
    """The content of a fastwarc record whose HTTP is not parsed yet.

    Raises `DataError`, without the place, where it is truncated, too long, or not compressed as declared.
    """
    type_ = str(record.record_type)
    if record.headers.get("Content-Length") is None:  # it has to have one; this header is cut
        raise DataError(CUT)
    if type_ not in ("response", "resource", "conversion"):
        if record.reader.consume() < record.content_length:
            raise DataError(CUT)
        return PassedOver(f"record of type {type_}")
    if record.content_length > MOST:
        raise DataError(f"it has {record.content_length:,} bytes; more than {MOST:,} are no page; remove the record")
    data = record.reader.read(MOST)
    if len(data) < record.content_length:  # fastwarc ends in silence at a cut
        raise DataError(CUT)
    content_type = record.headers.get("Content-Type") or ""
    if type_ == "response" and (not content_type or "application/http" in content_type.lower()):
        return _of_response(data)
    kind, charset = mime_type(content_type, data)
    return _of_kind(kind, data, "utf-8" if type_ == "conversion" else charset)


CUT = "the file ends within this record; fetch it again"


def _of_response(data: bytes) -> Content | PassedOver:
    status, headers, body = parse_http(data)
    if status not in (None, 200):
        return PassedOver(f"status {status}")
    if not body:
        return PassedOver("empty body")
    content_type = headers.get("content-type", "")
    if content_type and (kind := mime_type(content_type, body)[0]) not in WEB_TEXT:
        return PassedOver(f"content type {kind}")  # what it is packed in does not matter
    body = unpacked(body, headers)
    kind, charset = mime_type(content_type, body)
    return _of_kind(kind, body, charset)


def _of_kind(kind: str, data: bytes, charset: str | None) -> Content | PassedOver:
    return Content(data, "html" in kind, charset) if kind in WEB_TEXT else PassedOver(f"content type {kind}")


# HTTP

BLANK_LINE = re.compile(rb"\r?\n[ \t]*\r?\n")
FOLD = re.compile(rb"\r?\n[ \t]+")
LINE_END = re.compile(rb"\r?\n")
STATUS = re.compile(rb"HTTP/[\d.]*\s+(\d{3})", re.IGNORECASE)
HEADER = re.compile(rb"([!#-'*+.^-z|~\w-]+)[ \t]*:")


def parse_http(data: bytes) -> tuple[int | None, dict[str, str], bytes]:
    """The status (None without a status line), the headers by their names in lower case, and the body of a response.

    Of repeated headers the last counts, but encodings are joined. Data that begin neither with a status nor with a
    header are all body.
    """
    status = STATUS.match(data)
    if status is None and HEADER.match(data) is None:
        return None, {}, data
    blank = BLANK_LINE.search(data)
    head, body = (data[: blank.start()], data[blank.end() :]) if blank else (data, b"")
    headers: dict[str, str] = {}
    for line in LINE_END.split(FOLD.sub(b" ", head)):
        name, colon, value = line.partition(b":")
        key, text = name.strip().lower().decode("latin-1"), value.strip().decode("latin-1")
        if colon and text:
            headers[key] = f"{headers[key]}, {text}" if key in ENCODINGS and key in headers else text
    return int(status[1]) if status else None, headers, body


MIME = re.compile(r"\s*([\w!#$%&'*+.^`|~-]+/[\w!#$%&'*+.^`|~-]+)\s*(?:;|$)")
CHARSET = re.compile(r""";\s*charset\s*=\s*["']?\s*([^"'\s;,]+)""", re.IGNORECASE)
HTML = re.compile(
    rb"[\t\n\x0c\r ]*<"
    rb"(?:(?:!doctype html|html|head|script|iframe|h1|div|font|table|a|style|title|b|body|br|p)[ >]|!--)",
    re.IGNORECASE,
)
XML = re.compile(rb"[\t\n\x0c\r ]*<\?xml")
BINARY = re.compile(rb"[\0-\x08\x0b\x0e-\x1a\x1c-\x1f]")
MARKS = (b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe")


def mime_type(content_type: str, data: bytes) -> tuple[str, str | None]:
    """The type of some content and its encoding, by the header, or, without one, by its first bytes."""
    found, charset = MIME.match(content_type), CHARSET.search(content_type)
    kind = found[1].lower() if found else ""
    if kind in ("", "unknown/unknown", "application/unknown", "*/*"):
        head = data[:1445].removeprefix(MARKS[0])
        if HTML.match(head):
            kind = "text/html"
        elif XML.match(head):
            kind = "text/xml"
        elif data.startswith(MARKS) or not BINARY.search(head):
            kind = "text/plain"
        else:
            kind = "application/octet-stream"
    return kind, charset[1] if charset else None


# Packing

ENCODINGS = "transfer-encoding", "content-encoding"  # as they are undone
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


def unpacked(body: bytes, headers: dict[str, str]) -> bytes:
    """A response's body without its transfer and content encodings.

    Crawlers often store the body with one or both undone under the old header, so what cannot be undone is taken for
    undone already, unless it still looks packed.
    """
    failed = []
    for header in ENCODINGS:
        for name in reversed([name.strip().lower() for name in headers.get(header, "").split(",")]):
            if name in ("", "identity"):
                continue
            try:
                body = UNPACK[name](body)
            except Exception as error:
                if not isinstance(error, (KeyError, EOFError, zlib.error, *_errors())):
                    raise
                reason = "unknown" if isinstance(error, KeyError) else error
                failed.append(f"{header.title()}: {headers[header]}: {reason}")
    if failed and _looks_packed(body):
        raise DataError(f"the body is not what its header says ({', '.join(failed)}); remove the record")
    return body


def _looks_packed(body: bytes) -> bool:
    if CHUNK_SIZE.match(body):
        return True
    try:
        body.decode()
        return False
    except UnicodeDecodeError:
        return BINARY.search(body) is not None


def _errors() -> tuple[type[Exception], ...]:
    """What the packages raise for damaged data."""
    return require("brotli", "data").error, require("zstandard", "data").ZstdError


def _without_chunks(body: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while (size := CHUNK_SIZE.match(body, at)) is not None:
        length = int(size[1], 16)
        if not length:
            return b"".join(parts)
        part = body[size.end() : size.end() + length]
        if len(part) < length:
            break
        parts.append(part)
        at = size.end() + length
        at += 2 if body.startswith(b"\r\n", at) else body.startswith(b"\n", at)
    raise EOFError("a chunk is incomplete")


def _inflated(body: bytes, bits: int) -> bytes:
    """zlib's data: of gzip, members one after another."""
    parts: list[bytes] = []
    room = MOST
    while body:
        unpacker = zlib.decompressobj(bits)
        parts.append(unpacker.decompress(body, room + 1))
        room = _room(room, parts[-1])
        if not unpacker.eof:
            raise EOFError("it is incomplete")
        body = unpacker.unused_data if bits == GZIP and unpacker.unused_data.startswith(b"\x1f\x8b") else b""
    return b"".join(parts)


def _room(room: int, part: bytes) -> int:
    if len(part) > room:
        raise DataError(f"its body unpacks to more than {MOST:,} bytes, which is no page; remove the record")
    return room - len(part)


def _deflated(body: bytes) -> bytes:
    """What servers call deflate: zlib's format, as the standard says, or the bare data."""
    try:
        return _inflated(body, zlib.MAX_WBITS)
    except zlib.error:
        return _inflated(body, -zlib.MAX_WBITS)


def _without_brotli(body: bytes) -> bytes:
    unpacker = require("brotli", "data").Decompressor()
    text: bytes = unpacker.process(body, output_buffer_limit=MOST + 1)
    while not unpacker.is_finished() and len(text) <= MOST:
        more: bytes = unpacker.process(b"", output_buffer_limit=MOST + 1 - len(text))
        if not more:
            raise EOFError("it is incomplete")
        text += more
    _room(MOST, text)
    return text


def _without_zstd(body: bytes) -> bytes:
    reader = require("zstandard", "data").ZstdDecompressor().stream_reader(body, read_across_frames=True)
    text: bytes = reader.read(MOST + 1)
    _room(MOST, text)
    return text


GZIP = 31  # zlib's window bits and its mark of gzip
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "chunked": _without_chunks,
    "gzip": lambda body: _inflated(body, GZIP),
    "x-gzip": lambda body: _inflated(body, GZIP),
    "deflate": _deflated,
    "br": _without_brotli,
    "zstd": _without_zstd,
}
