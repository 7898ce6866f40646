"""The types that a setting may have: their names for people, and parsing and checking of values.

Supported are int, float, bool, str, Path, Literal, tuple, dict of such, Optional, nested dataclasses, and tuples of
dataclasses. A value of the wrong type raises `Mismatch`, to which the caller adds the place.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SHOWN = 200  # characters of a value in a message
_UNIONS = (Union, types.UnionType)


class Mismatch(Exception):
    """A value that is not of the annotated type."""


def check_leaf(annotation: Any, value: Any) -> Any:
    """`value` as a leaf of the annotated type, or `Mismatch`. A bool is no number; an int is accepted as a float."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in _UNIONS:
        return _check_union(args, value)
    if origin is Literal:
        return _check_choice(args, value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = _kinds(args, len(value))
        if len(kinds) != len(value):
            raise Mismatch
        return tuple(check_leaf(kind, item) for kind, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {_key(args[0], k): check_leaf(args[1], v) for k, v in value.items()}
    if annotation is Path and isinstance(value, str | Path):
        return Path(value)
    if annotation is float and type(value) is int:
        return _as_float(value)
    if origin is None and type(value) is annotation:
        return value
    raise Mismatch


def _key(annotation: Any, key: Any) -> Any:
    """The key of a dict: TOML and JSON have text alone, so a number is written as one."""
    if annotation is not int:
        return str(key)
    try:
        number = int(key)
    except ValueError:
        raise Mismatch from None
    if str(number) != str(key):
        raise Mismatch  # "05" and "5" would be one
    return number


def _check_choice(choices: tuple[Any, ...], value: Any) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise Mismatch


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise Mismatch from None


def _check_union(kinds: tuple[Any, ...], value: Any) -> Any:
    if type(None) in kinds and (value is None or value == "none"):
        return None
    for kind in sorted(kinds, key=lambda k: k is float):  # an int is itself first, a float only at need
        try:
            return check_leaf(kind, value)
        except Mismatch:
            continue
    raise Mismatch


def parse_leaf(annotation: Any, text: str) -> Any:
    """Read the text of an override; what cannot be read is left as it is, for `check_leaf` to refuse."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in _UNIONS:
        return _parse_union(args, text)
    if origin is Literal:
        return next((choice for choice in args if str(choice) == text), text)
    if origin is tuple and not text.lstrip().startswith("["):
        return _parse_list(args, text)
    try:
        if annotation in (int, float):
            return annotation(text)
        if origin in (tuple, dict):
            return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # TOMLDecodeError is one
        return text
    if annotation is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return text


def _parse_union(kinds: tuple[Any, ...], text: str) -> Any:
    for kind in sorted(kinds, key=lambda k: k is str):  # text only where nothing else can be read
        if kind is not type(None) and type(parsed := parse_leaf(kind, text)) is not str:
            return parsed
    return text


def _parse_list(args: tuple[Any, ...], text: str) -> Any:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    kinds = _kinds(args, len(parts))
    if parts and len(kinds) != len(parts):
        return text
    return tuple(parse_leaf(kind, part) for kind, part in zip(kinds, parts, strict=False))


def _kinds(args: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """The types of a tuple's n items: tuple[int, ...] has any number of one."""
    return (args[0],) * n if args[-1] is Ellipsis else args


def shown(value: Any) -> str:
    """A value in a message: as TOML has it where Python writes it otherwise, and not more of it than one reads."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def type_name(annotation: Any) -> str:
    """A type in a user's words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in _UNIONS:
        return " or ".join('"none"' if kind is type(None) else type_name(kind) for kind in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if origin is tuple:
        return (
            f"a list of {_plural(args[0])}"
            if args[-1] is Ellipsis
            else f"a list of {len(args)}: {', '.join(map(type_name, args))}"
        )
    if origin is dict:
        return f"a table of {_plural(args[1])}" + (", each under a whole number" if args[0] is int else "")
    if dataclasses.is_dataclass(annotation):
        return "a table"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text in quotes",
        Path: "a path in quotes",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "choices from " + ", ".join(repr(choice) for choice in get_args(annotation))
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(annotation, f"{type_name(annotation)} each")


def hints(cls: Any) -> dict[str, Any]:
    """The type of each field of a dataclass, without what marks a path."""
    types_of = get_type_hints(cls)
    return {f.name: types_of[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


@functools.cache
def marked_hints(cls: Any) -> dict[str, Any]:
    """The same with what marks a path."""
    types_of = get_type_hints(cls, include_extras=True)
    return {f.name: types_of[f.name] for f in dataclasses.fields(cls)}


def is_table_list(annotation: Any) -> bool:
    """Whether a field holds any number of dataclasses: tuple[TrainingStage, ...], in the file [[stages]]."""
    args = get_args(annotation)
    return get_origin(annotation) is tuple and dataclasses.is_dataclass(args[0]) and args[-1] is Ellipsis
