"""The little of protobuf's wire format that a SentencePiece model needs, instead of a dependency on protobuf.

A message is a row of fields, each a key (number and type) and a value. One that occurs twice is merged by readers, the
later winning, so a setting is changed by appending a field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def field(number: int, value: int | float | bytes) -> bytes:
    """Return one field: an integer, a 32-bit float, or bytes (a string or an inner message)."""
    if isinstance(value, bytes):
        return _varint(number << 3 | BYTES) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | FIXED32) + struct.pack("<f", value)
    return _varint(number << 3 | VARINT) + _varint(value)


def fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (field number, value): integers, 32-bit floats, and bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            yield number, varint()
        elif wire == FIXED32:
            yield number, struct.unpack_from("<f", message, at)[0]
            at += 4
        else:
            size = 8 if wire == FIXED64 else varint()
            yield number, message[at : at + size]
            at += size


def _varint(n: int) -> bytes:
    """Return n as 7 bits a byte, low first; a negative one as 64 bits."""
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])
