"""The subset of protobuf's wire format that a SentencePiece model needs, which saves a dependency on protobuf.

A message is a sequence of fields, each a key (number and type) and a value. If a field occurs twice, readers take the
later one, so a setting is changed by appending a field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from arriero.errors import CheckpointError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def field(number: int, value: int | float | bytes) -> bytes:
    """Return one field: an integer, a 32-bit float, or bytes (a string or an inner message)."""
    if isinstance(value, bytes):
        return _varint(number << 3 | BYTES) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | FIXED32) + struct.pack("<f", value)
    return _varint(number << 3 | VARINT) + _varint(value)


def fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (field number, value): integers, 32-bit floats, and bytes for all else.

    Raises `CheckpointError` where the message ends within a field, or has one that is none.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise CheckpointError("damaged: it ends within a number, or has one of more than 64 bits")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire not in (VARINT, FIXED64, BYTES, FIXED32):  # 3 and 4 are groups, which nothing writes any more
            raise CheckpointError(f"damaged: a field of the wire type {wire}, which protobuf has not")
        if wire == VARINT:
            yield number, varint()
        else:
            size = {FIXED32: 4, FIXED64: 8}[wire] if wire != BYTES else varint()
            value = message[at : at + size]
            if len(value) < size:
                raise CheckpointError("damaged: it ends within a field")
            yield number, struct.unpack("<f", value)[0] if wire == FIXED32 else value
            at += size


def _varint(n: int) -> bytes:
    """Return n as 7 bits a byte, low first; a negative one as 64 bits."""
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])
