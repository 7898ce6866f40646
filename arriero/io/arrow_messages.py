"""What the messages of an Arrow stream say they unpack to, read before pyarrow unpacks anything.

A record batch may have its buffers compressed one by one, each behind eight bytes that state its unpacked size; pyarrow
allocates what they state, and a few kilobytes of zeros may state gigabytes. Where buffers lie is said by the message's
flatbuffer (format/Message.fbs), of which these are the few fields that matter.

Price: a walk over the messages, which touches one page of the file for each compressed buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

_DICTIONARY, _RECORDS = 2, 3  # kinds of a message's header
_HEADER_KIND, _HEADER = 1, 2  # fields of a message
_DATA = 1  # field of a dictionary batch
_BUFFERS, _COMPRESSION = 2, 3  # fields of a record batch


def unpacked_sizes(messages: Any) -> Iterator[tuple[int, int, bool]]:
    """Of each batch: bytes in the file, bytes that its compressed buffers state, and whether it holds rows.

    messages: a `pyarrow.ipc.MessageReader`. Raises `struct.error` and what pyarrow raises for a damaged file.
    """
    for message in messages:
        data, body = memoryview(message.metadata), message.body
        table = _table(data, 0)
        kind_at, header = _field(data, table, _HEADER_KIND), _field(data, table, _HEADER)
        kind = data[kind_at] if kind_at else 0
        if kind not in (_DICTIONARY, _RECORDS) or not header:
            continue
        batch = _table(data, header)
        if kind == _DICTIONARY:
            batch = _table(data, _field(data, batch, _DATA))
        size = 0 if body is None else body.size
        yield size, _stated(data, batch, memoryview(body)) if size else 0, kind == _RECORDS


def _stated(data: memoryview, batch: int, body: memoryview) -> int:
    buffers = _field(data, batch, _BUFFERS)
    if not _field(data, batch, _COMPRESSION) or not buffers:
        return 0
    vector = buffers + struct.unpack_from("<I", data, buffers)[0]
    (n,) = struct.unpack_from("<I", data, vector)
    total = 0
    for i in range(n):
        offset, length = struct.unpack_from("<qq", data, vector + 4 + 16 * i)
        if length >= 8:
            total += max(0, struct.unpack_from("<q", body, offset)[0])  # -1: this one is not compressed
    return total


def _table(data: memoryview, at: int) -> int:
    """Where the table begins that the offset at `at` points to."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a table's field lies, or 0 where it has none."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else 0
