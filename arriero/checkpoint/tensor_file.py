"""A safetensors file, read and written tensor by tensor: 8 bytes with the length of the JSON, the JSON, raw tensors.

The JSON follows from names, shapes and types, before any tensor is read, so a writer holds one tensor at a time. The
safetensors package's writer needs all of them at once, and its reader copies out of a memory map, ten times as slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from arriero.errors import CheckpointError
from arriero.io.files import json_text
from arriero.io.reading import reading
from arriero.io.records import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")  # types of a model's weights
_EXPONENTS = {  # integer type of the same size, and the bits of the exponent in it
    torch.float64: (torch.int64, 0x7FF << 52),
    torch.float32: (torch.int32, 0xFF << 23),
    torch.bfloat16: (torch.int16, 0xFF << 7),
    torch.float16: (torch.int16, 0x1F << 10),
}
_CHECKED = 1 << 17  # values looked at together, as many as the cache holds
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Shape of a tensor and the type it is read as."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def header(entries: Mapping[str, Entry], **metadata: str) -> bytes:
    """What a file of these tensors, in this order, begins with."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}  # "pt": transformers asks for it
    end = 0
    for name, entry in entries.items():
        start, end = end, end + prod(entry.shape) * entry.dtype.itemsize
        described[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json_text(described).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors begin on a cache line
    return len(text).to_bytes(8, "little") + text


def safetensors_entries(file: Path, types: Sequence[str] = FLOATS) -> dict[str, Entry]:
    """Names, shapes and types of the tensors in a safetensors file; those of other `types` are refused."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, though the index names it")
    entries = {}
    with reading(file), safe_open(file, "pt") as tensors:  # the library checks that tensors lie within, side by side
        pieces = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (safe_open is no dictionary)
        found = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in pieces.items()}
    for name, (dtype, shape) in found.items():
        if dtype not in types:
            raise CheckpointError(f"{file}: tensor {name} has type {dtype}; readable are {', '.join(types)}")
        entries[name] = Entry(shape, DTYPES[dtype])
    return entries


class Reader(Protocol):
    """Reads one tensor by name, or its rows from `start` to `stop`, into memory of its own."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor."""


def tensor_reader(file: Path) -> Reader:
    """The reader of a safetensors file.

    By plain reads: copying out of the library's memory map takes ten times as long (1.7 s against 0.15 s for 270 MB
    here), a page fault at a time. `safetensors_entries` checks the header first.
    """
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        with reading(file):
            described = parse_json(source.read(length))  # which refuses a tensor that stands in it twice

    def read(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        n_rows, *row = described[name]["shape"]
        stop = n_rows if stop is None else stop
        tensor = torch.empty(stop - start, *row, dtype=DTYPES[described[name]["dtype"]])
        with file.open("rb") as source:
            source.seek(8 + length + described[name]["data_offsets"][0] + start * prod(row) * tensor.itemsize)
            n_read = source.readinto(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore
        if n_read != tensor.nbytes:
            raise CheckpointError(f"{file}: cut short within {name}; copy or download it again")
        return tensor

    return read


def check_finite(source: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor read from `source`; raises CheckpointError where one of its values is NaN or infinite."""
    if all_finite(tensor):
        return tensor
    wrong = (~tensor.isfinite()).nonzero()
    raise CheckpointError(
        f"{source}: {name} holds {len(wrong):,} values that are NaN or infinite, the first at {wrong[0].tolist()}; the "
        "run that wrote it diverged, or the file is damaged: take an earlier checkpoint, or copy it again"
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: none has all bits of its exponent set.

    By NumPy, which stays on one thread and in the cache: 7 GB/s here. torch's own sums are as fast on an idle machine,
    but where cores are shared, their threads wait for each other at every tensor (docs/log.md, "Users' files").
    """
    kind, exponent = _EXPONENTS[tensor.dtype]
    bits = tensor.detach().cpu().contiguous().view(kind).numpy().reshape(-1)
    masked = np.empty(min(len(bits), _CHECKED), bits.dtype)
    for start in range(0, len(bits), _CHECKED):
        piece = bits[start : start + _CHECKED]
        if np.bitwise_and(piece, exponent, out=masked[: len(piece)]).max() == exponent:
            return False
    return True


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU in the type to write; raises CheckpointError where F16 makes infinities of values."""
    out = tensor.to("cpu", dtype)
    if dtype is torch.float16 and tensor.dtype is not dtype and not all_finite(out) and all_finite(tensor):
        raise CheckpointError(f"{name} holds weights beyond F16's 65,504; write bf16 or f32")
    return out


def write_safetensors(file: Path, entries: Mapping[str, Entry], read: Callable[[str], Tensor]) -> None:
    """Write a file tensor by tensor, in the order of `entries`; `read(name)` gives each."""
    with file.open("wb") as out:
        out.write(header(entries))
        for name, entry in entries.items():
            tensor = cast(name, read(name), entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, name
            out.write(tensor.view(torch.uint8).numpy().data)
