"""Readers with the faults that the mutation test is there to find, to see it find them."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

from arriero.errors import DataError, UserError


def write(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps({"a": [1, 2], "b": "text"}))


def faultless(folder: Path) -> object:
    try:
        return json.loads((folder / "a.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken: {error}") from error


def raises_key_error(folder: Path) -> None:
    _unless_valid(folder) and {}["missing"]


def panics(folder: Path) -> None:
    class PanicException(BaseException):
        """What pyo3 raises for a panic in Rust."""

    if _unless_valid(folder):
        raise PanicException


def says_nothing(folder: Path) -> None:
    if _unless_valid(folder):
        raise UserError


def allocates(folder: Path) -> None:
    _unless_valid(folder) and b"x" * 2**29


def reserves(folder: Path) -> None:
    _unless_valid(folder) and bytearray(2**42)


def loops(folder: Path) -> None:
    while _unless_valid(folder):
        pass


def crashes(folder: Path) -> None:
    _unless_valid(folder) and ctypes.string_at(0)


def ignores(folder: Path) -> str:
    return (folder / "a.json").read_bytes()[:1].hex()


def _unless_valid(folder: Path) -> bool:
    return (folder / "a.json").read_text(errors="replace") != json.dumps({"a": [1, 2], "b": "text"})


FAULTS = {
    "traceback": [raises_key_error, panics, says_nothing, reserves], "memory": [allocates], "hang": [loops],
    "death": [crashes],
}  # fmt: skip
