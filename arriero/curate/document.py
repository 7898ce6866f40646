"""A document: the unit that curation keeps, edits or drops, and that tokenizers and shards are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    text: str
    id: str
    """The source's own, or file and row ("prose.jsonl.gz:17"): the same whenever the same sources are read."""
    source: str = ""
    """What it is part of, such as "wikipedia": the row's own word, "code" for source code, else the source's name."""
    url: str = ""
    date: str = ""
    """As the source writes it; ISO 8601 sorts by age."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The row's other columns."""
