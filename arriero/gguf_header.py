"""The header of a GGUF file: its typed key-value pairs and its table of tensors, as plain Python values.

It stands beside errors.py because both the tokenizer (which lives in the pairs) and the checkpoint reader need it.
The gguf package's own reader makes several NumPy views of each of a vocabulary's 100,000 strings, which takes
seconds; this takes a tenth of one.

Layout, little-endian: "GGUF", version u32, number of tensors u64, number of pairs u64; then the pairs (key, type u32,
value), the tensors (name, number of dimensions u32, dimensions u64 from the fastest, type u32, offset u64), padding.
"""

from __future__ import annotations

import functools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32  # unless general.alignment says otherwise

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


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

    Raises `CheckpointError` when the file is not GGUF, of a version not read here, one of several parts, or cut short.
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
        cursor = _Cursor(data)
        try:
            return _parse(file, cursor, size)
        except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{file}: damaged or cut short near byte {cursor.position} of {size}; copy or download it again"
            ) from error


class _Cursor:
    """Reads little-endian values one after another; raises IndexError or struct.error past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise IndexError
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data):
            raise IndexError
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind]}"
        values = list(struct.unpack_from(layout, self.data, self.position))
        self.position += struct.calcsize(layout)
        return values


def _parse(file: Path, cursor: _Cursor, size: int) -> Header:
    if cursor.data[:4] != MAGIC:
        raise CheckpointError(f"{file}: not a GGUF file (it does not begin with 'GGUF')")
    cursor.position = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(f"{file}: GGUF version {version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_pairs = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(n_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{file}: one of {metadata['split.count']} parts; join them with llama.cpp's llama-gguf-split --merge"
        )
    table = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(n_dims)]))
        table.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {name: TensorInfo(shape, kind, data_start + offset) for name, shape, kind, offset in table}
    return Header(metadata, tensors, size)
