"""One file, written so that a reader never sees half of it: temporary name, fsync, rename. And a directory's lock.

A crash leaves either the old content or the new, and at worst a stray file whose name begins with a dot.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arriero.errors import UserError

LOCK = ".lock"


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8; a reader sees the old file or the new one, never a part."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n", errors="surrogatepass")


@contextmanager
def locked(directory: Path, busy: UserError) -> Iterator[None]:
    """Keep other processes from working in `directory`, which is made if need be; raises `busy` where one does.

    The lock goes with the process, however it ends; a directory that is left empty goes too. Nothing is held on
    Windows and on file systems without locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # taken away by one that has just finished, and perhaps made anew by a third
        except BlockingIOError:
            raise busy from None
        except (ImportError, OSError):
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                directory.rmdir()


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process will choose."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


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
