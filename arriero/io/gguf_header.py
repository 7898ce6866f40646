"""The header of a GGUF file: its typed key-value pairs and its table of tensors, as plain Python values.

It is in io/ because both the tokenizer (which is stored in the pairs) and the checkpoint reader need it. The gguf
package's own reader creates several NumPy views for each of a vocabulary's 100,000 strings, which takes seconds; this
one takes a tenth of a second.

Layout, little-endian: "GGUF", version u32, number of tensors u64, number of pairs u64; then the pairs (key, type u32,
value), the tensors (name, number of dimensions u32, dimensions u64 from the fastest, type u32, offset u64), padding.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from arriero.errors import CheckpointError
from arriero.io.fields import Fields

MAGIC = b"GGUF"
_LENGTH = struct.Struct("<Q")  # of a text
ALIGNMENT = 32  # unless general.alignment says otherwise

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9  # an array of arrays is refused, as by llama.cpp
MAX_DIMS = 4  # GGML_MAX_DIMS
# Bytes that each takes at least: a text (its length), a pair (key, type, value), a row of the table of tensors.
_SMALLEST_STRING, _SMALLEST_PAIR, _SMALLEST_ROW = 8, 8 + 4 + 1, 8 + 4 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """A row of the table: shape in PyTorch's order, the number of its type, and the byte that it begins at."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """Metadata by key, tensors by name, and the size of the whole file in bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    size: int


def read_metadata(file: str | Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file; arrays are lists. The caller must not change them."""
    return read_header(file).metadata


def read_header(file: str | Path) -> Header:
    """Parse the header of a GGUF file, once for each state of the file.

    Raises `CheckpointError` when the file is not GGUF, of a version not read here, one of several parts, cut short, or
    inconsistent: a count, length or offset beyond its end, a key or tensor twice.
    """
    file = Path(file)
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    return _read_header(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # shape, tensors and tokenizer of one file each ask for it
def _read_header(file: Path, size: int, _mtime: int) -> Header:
    if size < 24:
        raise CheckpointError(f"{file}: {size} bytes are too few for a GGUF file; copy or download it again")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(file, data))


class _Cursor:
    """Reads little-endian values one after another. Lengths are checked before anything is allocated."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position, self.size = file, data, 0, len(data)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.file}: {what} (near byte {self.position:,} of {self.size:,}); copy or download it again"
        )

    def room(self, count: int, each: int, what: str) -> None:
        """Refuse what takes more than the rest of the file. each: bytes of one of `count` at least."""
        if count * each > self.size - self.position:
            self.refuse(f"damaged or cut short: {what} go beyond its end")

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.room(1, size, "its entries")
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.room(length, 1, f"{length:,} bytes of a text")
        raw = self.data[self.position : self.position + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"damaged: the text {raw[:40]!r} is not UTF-8")
        self.position += length
        return text

    def strings(self, count: int) -> list[str]:
        """So many texts: `string` in a loop of its own, since a vocabulary has hundreds of thousands."""
        data, size, at, texts = self.data, self.size, self.position, list[str]()
        with contextlib.suppress(UnicodeDecodeError):
            while len(texts) < count and at + 8 <= size:
                (length,) = _LENGTH.unpack_from(data, at)
                if length > size - at - 8:
                    break
                texts.append(data[at + 8 : at + 8 + length].decode("utf-8"))
                at += 8 + length
        self.position = at
        return texts + [self.string() for _ in range(count - len(texts))]  # which says what is wrong

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self._code(kind, key))
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            self.room(count, _SMALLEST_STRING, f"{count:,} texts of {key!r}")
            return self.strings(count)
        code = self._code(kind, key)
        self.room(count, struct.calcsize("<" + code), f"{count:,} values of {key!r}")
        values = list(struct.unpack_from(f"<{count}{code}", self.data, self.position))
        self.position += count * struct.calcsize("<" + code)
        return values

    def _code(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            self.refuse(f"damaged: {key!r} is of the type {kind}, which GGUF has not for a value")
        return _SCALARS[kind]


def _parse(cursor: _Cursor) -> Header:
    file = cursor.file
    if cursor.data[:4] != MAGIC:
        raise CheckpointError(f"{file}: not a GGUF file (it does not begin with 'GGUF')")
    cursor.position = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(f"{file}: GGUF version {version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_pairs = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.room(n_pairs, _SMALLEST_PAIR, f"{n_pairs:,} entries")
    cursor.room(n_tensors, _SMALLEST_ROW, f"{n_tensors:,} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = cursor.string()
        if key in metadata:
            cursor.refuse(f"the key {key!r} stands in it twice")
        metadata[key] = cursor.value(cursor.scalar("I"), key)
    fields = Fields(metadata, str(file))
    if (parts := fields.whole("split.count", 1, least=0)) > 1:
        raise CheckpointError(f"{file}: one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge")
    alignment = fields.whole("general.alignment", ALIGNMENT)
    if alignment & (alignment - 1):
        raise CheckpointError(f"{file}: general.alignment is {alignment:,}; it must be a power of two")
    table = [_row(cursor) for _ in range(n_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            cursor.refuse(f"the tensor {name!r} stands in it twice")
        if offset % alignment or data_start + offset > cursor.size:
            cursor.refuse(
                f"damaged: the tensor {name!r} begins at byte {offset:,} of the data, which is beyond its end, or no "
                f"multiple of {alignment}"
            )
        tensors[name] = TensorInfo(shape, kind, data_start + offset)
    return Header(metadata, tensors, cursor.size)


def _row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, n_dims = cursor.string(), cursor.scalar("I")
    if n_dims > MAX_DIMS:
        cursor.refuse(f"damaged: the tensor {name!r} has {n_dims:,} dimensions; GGUF knows {MAX_DIMS} at most")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(n_dims)]))
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")
