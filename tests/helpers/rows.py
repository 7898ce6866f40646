"""Rows of conversations, read as `arriero eval` reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from arriero.data.formats import Conversation, parse_records
from arriero.io.records import read_records, source_files


def read_conversations(source: str | Path) -> Iterator[Conversation]:
    """The conversations in a file, a directory or a Hub data set."""
    return parse_records(record for path in source_files(source) for record in read_records(path))
