"""Reading of untrusted files: whatever a library raises on a bad file becomes an error that names it; so does bad JSON.

fields.py then reads the entries of a JSON object by type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arriero.errors import CheckpointError, UserError
from arriero.show.terminal import warn_once

AGAIN = "copy or download it again"


@contextmanager
def reading(
    file: object,
    fault: str = "damaged or cut short",
    remedy: str = AGAIN,
    refusal: type[UserError] = CheckpointError,
) -> Iterator[None]:
    """Within this context, any exception of a library becomes a `refusal` that names the file and the remedy.

    Libraries raise errors of their own, bare Exception (tokenizers), KeyError, or a BaseException (a panic in Rust,
    torch's CheckpointException). Put only calls into a library inside: a mistake in our own code would be blamed on
    the file.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as error:
        raise refusal(f"{file}: {fault} (it asks for more memory than there is); {remedy}") from error
    except OSError as error:
        raise refusal(f"{file}: cannot be read ({error.strerror or error}); {remedy}") from error
    except BaseException as error:
        raise refusal(f"{file}: {fault} ({in_a_line(error)}); {remedy}") from error


def in_a_line(error: BaseException) -> str:
    """The message of an error in one line of limited length, or its type where there is no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def read_text(file: Path, remedy: str = AGAIN, refusal: type[UserError] = CheckpointError) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    with reading(file, "not UTF-8", remedy, refusal):
        return file.read_bytes().decode("utf-8-sig")


def parse_json(
    text: str | bytes, where: object, remedy: str = AGAIN, refusal: type[UserError] = CheckpointError
) -> Any:
    """The value in a text of JSON. where: what messages begin with, such as the file.

    Of a key that an object has twice the last value counts, as everywhere, and is said where the two differ.
    """

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            for key in {key for key, value in pairs if found[key] != value}:
                warn_once(f"{where}: the key {key!r} stands twice in an object, with two values; the last is used")
        return found

    try:
        return json.loads(text, object_pairs_hook=whole)
    except RecursionError as error:
        raise refusal(f"{where}: its JSON is nested too deeply; {remedy}") from error
    except ValueError as error:  # broken UTF-8, broken JSON, and numbers of thousands of digits
        raise refusal(f"{where}: not valid JSON ({in_a_line(error)}); {remedy}") from error


def read_json(
    file: Path,
    missing: dict[str, Any] | None = None,
    remedy: str = AGAIN,
    refusal: type[UserError] = CheckpointError,
) -> dict[str, Any]:
    """The object in a JSON file. missing: what to return where there is no file; None refuses.

    Raises `refusal` for whatever is not readable, and no JSON object.
    """
    if not file.is_file():
        if missing is not None:
            return missing
        raise refusal(f"{file}: no such file")
    value = parse_json(read_text(file, remedy, refusal), file, remedy, refusal)
    if not isinstance(value, dict):
        raise refusal(f"{file}: holds a JSON {type(value).__name__}; an object is expected")
    return value
