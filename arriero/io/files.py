"""Atomic writing of single files (temporary name, fsync, rename), the only writer of JSON, and directory locks.

A crash leaves either the old content or the new, and at worst a stray file whose name begins with a dot.

All JSON is written by the functions here, in a form that every reader accepts: numbers that are not finite become null
(NaN is not JSON); characters that some readers take for the end of a line, and lone surrogates, which UTF-8 cannot
encode, are escaped. Lines of text end at \\n, \\r\\n and \\r, and not at the other characters that `str.splitlines`
splits at (U+2028 occurs within sentences).
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from arriero.errors import ConfigError, DataError, UserError
from arriero.io.paths import hint

LOCK = ".lock"
_LINE_END = re.compile(r"\r\n|[\r\n]")
_READ_AS_LINE_ENDS = ("\u2028", "\u2029", "\x85")  # by JavaScript before 2019, and by str.splitlines


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
    """Write `text` to `path` as UTF-8, line ends as they are; a reader sees the old file or the new one, never a part.

    A lone surrogate, which UTF-8 cannot encode, becomes "?".
    """
    with replaced_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(json_bytes(value, indent=2) + b"\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write `rows` to `path`, a line of JSON each, whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(b"".join(map(json_line, rows)))


def json_line(value: Any) -> bytes:
    """`value` as a line of JSON lines, its end included."""
    return json_bytes(value) + b"\n"


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """`value` as JSON in UTF-8, with null for numbers that are not finite."""
    text = _dumped(value, ensure_ascii=False, indent=indent)
    for character in _READ_AS_LINE_ENDS:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate as \udxxx, which is JSON's escape of it


def json_text(value: Any, indent: int | None = None) -> str:
    """The same in ASCII, for an output of any encoding."""
    return _dumped(value, ensure_ascii=True, indent=indent)


def _dumped(value: Any, **options: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # a number that is not finite; rare, so other values are traversed once only
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """A copy of what `json` takes in which numbers that are not finite are None."""
    if isinstance(value, dict):
        return {str(key) if isinstance(key, float) else key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, line ends unchanged; a byte order mark at the beginning is removed.

    Raises `DataError` for a file that cannot be read, or is in another encoding.
    """
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a text file") from error


def decoded(data: bytes, name: str) -> str:
    """The text that bytes in UTF-8 hold, as `read_text` reads it; `name` is what an error calls them."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from error


def split_lines(text: str) -> list[str]:
    """The lines of `text` without their ends, of which the last line needs none; see the module for what ends one."""
    lines = _LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def make_output(directory: Path) -> None:
    """Make a directory, parents too, before the work whose results will be written there.

    Raises `ConfigError` where nothing can be written in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if directory.exists() else f"{error.strerror}{hint(directory)}"
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
