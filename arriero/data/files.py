"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process will choose."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8; a reader sees the old file or the new one, never a part."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n", errors="surrogatepass") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
