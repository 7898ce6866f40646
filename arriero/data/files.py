"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process will choose."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there is synced and put at `path`, or removed."""
    temporary = temporary_name(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8; a reader sees the old file or the new one, never a part."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n", errors="surrogatepass")


def put_in_place(temporary: Path, path: Path) -> None:
    """Sync a file or directory and rename it to `path`; when this returns, a power cut changes nothing."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories, and orders renames by itself
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
