"""A checkpoint named by its content: what caches of a model's codes, answers and probabilities are filed under.

Copies of one checkpoint have one name wherever they lie, and one changed byte makes another, though the file's size and
times stay as they were. Price: the files are read once, at a gigabyte a second where the CPU has SHA instructions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_DECIDES = (".safetensors", ".gguf", ".pth", ".json")  # endings of the files that decide what weights are


def content_digest(source: Path) -> str:
    """SHA-256 over the weights and settings at `source`, a directory or one file: 64 hexadecimal digits.

    The name of a single file does not count; those of a directory's files do. Raises `OSError` for what cannot be read.
    """
    inside = source.is_dir()
    files = sorted(f for f in source.iterdir() if f.suffix in _DECIDES) if inside else [source]
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update((path.name if inside else "").encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
