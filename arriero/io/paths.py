"""Paths as users write them, and the directory of Arriero's cache.

"~" and "~/..." are the home directory and "~name/..." another user's, as in a shell, wherever a path is given: a flag,
a settings file, a call in Python. Environment variables are not expanded. Where a name could also be that of something
built in (a model, a shape, a preset, a law), an existing path of that name takes precedence, which is said once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from arriero.errors import ConfigError, did_you_mean
from arriero.show.terminal import warn_once


class PathMark:
    """Marks texts that may name a file or a directory, among the types of settings and parameters."""


PathText = Annotated[str, PathMark()]


def expand(text: str) -> str:
    """`text` with the home in the place of a "~" at its beginning. Raises `ConfigError` for what cannot be a path.

    A name like "~backup.txt" that is no user's is left as it is where there is such a file.
    """
    if "\0" in text:
        raise ConfigError(f"{text!r}: no path has a NUL character; take it out")
    if not text.startswith("~"):
        return text
    full = os.path.expanduser(text)
    if full.startswith("~") and not os.path.lexists(text):
        user = text.partition("/")[0]
        raise ConfigError(f"{text}: there is no home of a user {user[1:]!r}; write ./{text} for a name with a tilde")
    return full


def as_path(path: str | Path) -> Path:
    """A path that a user gave, its "~" expanded; raises `ConfigError` for an empty one: it would be this directory."""
    if str(path) == "":
        raise ConfigError("a path is empty; give a name, or . for this directory")
    return Path(expand(str(path)))


def expanded(annotation: Any, value: Any) -> Any:
    """`value` of a field or parameter with every path in it expanded: texts that `annotation` marks, and `Path`s."""
    if isinstance(value, Path):
        return as_path(value)
    if isinstance(value, str):
        return expand(value) if _is_marked(annotation) else value
    inner = (get_args(annotation) or (None,))[0]
    if isinstance(value, tuple | list):
        return type(value)(expanded(inner, item) for item in value)
    if isinstance(value, Mapping):
        return {key: expanded((get_args(annotation) or (None,))[-1], item) for key, item in value.items()}
    return value


def _is_marked(annotation: Any) -> bool:
    """Whether a type is `PathText`, or may be."""
    marks = getattr(annotation, "__metadata__", ()) if get_origin(annotation) is Annotated else ()
    return any(isinstance(mark, PathMark) for mark in marks) or any(map(_is_marked, get_args(annotation)[:2]))


def hint(path: str | Path) -> str:
    """The end of an error for a missing `path`: the target of a broken link, or similar names, if any."""
    path = Path(path)
    try:
        if path.exists():  # and is of another kind than was asked for
            return ""
        if path.is_symlink():
            return f" (it is a link to {os.readlink(path)!r}, which is not there)"
        near = did_you_mean(path.name, (other.name for other in path.parent.iterdir()))
    except OSError:  # no such directory either, or one that may not be read
        return " (environment variables are not expanded)" if "$" in str(path) else ""
    return near


def files_below(directory: Path) -> list[Path]:
    """Every file below a directory, sorted; links to directories are not followed. Raises OSError where one of the
    directories cannot be read, which `rglob` passes over."""

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(directory, onerror=refuse)
    return sorted(Path(folder, name) for folder, _, names in walk for name in names if Path(folder, name).is_file())


def lies_here(name: str, built_in: str) -> bool:
    """Whether a name of something built in is a path here, and so means that; says so once.

    built_in: what it would mean otherwise, such as "the built-in model".
    """
    if not os.path.exists(name):
        return False
    kind = "directory" if os.path.isdir(name) else "file"
    warn_once(f"{name} is the {kind} of that name here, not {built_in}; work elsewhere, or rename it, to get that")
    return True


def cache_dir() -> Path:
    """Arriero's cache: $ARRIERO_CACHE, else `arriero` in $XDG_CACHE_HOME, else ~/.cache/arriero."""
    if own := os.environ.get("ARRIERO_CACHE"):
        return as_path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "arriero"
