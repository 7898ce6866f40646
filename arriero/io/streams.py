"""The content of a text file as UTF-8, whatever its compression and Unicode encoding.

gzip, zstd, bzip2 and xz are decompressed. The size of the result is bounded, so that a small file cannot fill the
memory: a row (a line, an object, a record of CSV) may have 8 MB, or 16 times what has been read of the compressed file.
Text is about 3 to 10 times its gzip or zstd.

Price: nothing for plain UTF-8, which is passed through.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from arriero.errors import DataError, require

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
PIECE = 1 << 17  # bytes of a packed file that are read at once
MOST, RATIO = 8_000_000, 16  # of a row: unpacked bytes, or unpacked bytes for each that was read


@dataclass
class Opened:
    """A file's bytes, decompressed, in UTF-8; its reader reports where rows end."""

    stream: IO[bytes]
    done: Callable[[], float]
    """The share of the file that has been read."""
    row_ends: Callable[[], None]


class CannotGoOn(DataError):
    """A file cannot be read on from here; the text names it."""


class Damaged(Exception):
    """The compressed data are damaged; the message says how."""


def endings(path: Path) -> tuple[str, str]:
    """The ending of a name for the kind of file, and that of its compression or nothing; in lower case."""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in COMPRESSED else (name.suffix, "")


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a file for reading; its stream raises `Damaged`, or `CannotGoOn` where a row is too long."""
    size, packing = max(1, path.stat().st_size), endings(path)[1]
    with open(path, "rb") as raw:
        unpacked = _Unpacked(path, raw, packing) if packing else None
        stream = cast(IO[bytes], io.BufferedReader(unpacked, 1 << 18)) if unpacked else raw
        if (encoding := _encoding(stream)) is not None:
            stream = cast(IO[bytes], io.BufferedReader(_InUtf8(path, stream, encoding), 1 << 18))
        yield Opened(stream, lambda: raw.tell() / size, unpacked.row_ends if unpacked else lambda: None)


def _encoding(stream: Any) -> str | None:
    """UTF-16 or UTF-32, by the byte order mark or by the zero bytes of the first characters, as for JSON."""
    encoding = json.detect_encoding(stream.peek(4)[:4])
    return encoding if encoding.startswith(("utf-16", "utf-32")) else None


class _Unpacked(io.RawIOBase):
    """The content of a packed file, bounded between the ends of rows."""

    def __init__(self, path: Path, raw: IO[bytes], packing: str) -> None:
        self._path, self._raw, self._of_row = path, raw, 0
        self._read: Callable[[int], bytes]
        if packing == ".gz":
            self._read = gzip.GzipFile(fileobj=raw).read
        elif packing == ".bz2":
            self._read = bz2.BZ2File(raw).read
        elif packing == ".xz":
            self._read = _Frames(raw, lambda: lzma.LZMADecompressor(memlimit=1 << 27)).read
        else:
            self._read = _Frames(raw, require(ZSTD, "data").ZstdDecompressor).read

    def readable(self) -> bool:
        return True

    def row_ends(self) -> None:
        self._of_row = 0

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._read(len(buffer))
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, _zstd_error()) as error:
            raise Damaged(str(error)) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise Damaged(str(error)) from error  # so bzip2 says it
        self._of_row += len(content)
        if self._of_row > max(MOST, RATIO * self._raw.tell()):
            raise CannotGoOn(
                f"{self._path}: a row unpacks to over {self._of_row / 1e6:.0f} MB from {self._raw.tell():,} bytes, "
                "as no text does; unpack the file and look at it"
            )
        buffer[: len(content)] = content
        return len(content)


class _Frames:
    """The content of frames of zstd or xz, one after another; a cut file raises EOFError."""

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._frame: Any = None

    def read(self, size: int) -> bytes:
        content = b""
        while not content:
            frame = self._frame
            if frame is None or frame.eof:
                rest = frame.unused_data if frame else b""
                rest = rest.lstrip(b"\0") or self._raw.read(PIECE)  # xz may be padded with zeros
                if not rest:
                    return b""
                frame = self._frame = self._new()
            elif not frame.needs_input:
                rest = b""
            elif not (rest := self._raw.read(PIECE)):
                raise EOFError("the last frame is incomplete")
            content = frame.decompress(rest, size)
        return content


def _zstd_error() -> type[Exception]:
    """What damaged zstd data raises; an error that nothing raises where the package is not even loaded."""
    module = sys.modules.get(ZSTD)
    return module.ZstdError if module else gzip.BadGzipFile


class _InUtf8(io.RawIOBase):
    """UTF-16 or UTF-32 as UTF-8."""

    def __init__(self, path: Path, source: IO[bytes], encoding: str) -> None:
        self._path, self._source, self._encoding = path, source, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b" "
        while not self._content and data:
            data = self._source.read(1 << 16)
            try:
                self._content = memoryview(self._decoder.decode(data, not data).encode())
            except UnicodeError as error:
                name = self._encoding.upper()
                raise CannotGoOn(f"{self._path}: broken {name} ({error}); convert the file to UTF-8") from error
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count
