"""One file, written so that a reader never sees half of it: temporary name, fsync, rename. And a directory's lock.

A crash leaves either the old content or the new, and at worst a stray file whose name begins with a dot.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from arriero.errors import ConfigError, UserError

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


def make_output(directory: Path) -> None:
    """Make a directory, parents too, before the work whose results are to lie there.

    Raises `ConfigError` where nothing can be written in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if directory.is_file() else error.strerror
        raise ConfigError(f"{directory}: nothing can be written there ({reason}); give another --out") from error
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"{directory}: nothing can be written there (no permission); give another --out")


@contextmanager
def locked(directory: Path, busy: UserError) -> Iterator[None]:
    """Keep other processes from working in `directory`, made as by `make_output`; raises `busy` where one does.

    The lock goes with the process, however it ends; a directory that was made here and is left empty goes too. Nothing
    is held on Windows and on file systems without locks.
    """
    path, is_new = directory / LOCK, not directory.exists()
    make_output(directory)
    with _opened(path, busy) as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except (ImportError, OSError):
            pass
        else:
            if not _lies_at(file, path):
                raise busy  # one that has just finished took it away, and perhaps a third has made it anew
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                if is_new:
                    directory.rmdir()


def _opened(path: Path, busy: UserError) -> IO[str]:
    try:
        return open(path, "a")
    except FileNotFoundError:  # one that has just finished took the directory away
        raise busy from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); remove it, or give another --out") from error


def _lies_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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
