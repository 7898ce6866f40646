"""Builds a configuration from nested dicts, as TOML and JSON give them; errors name the key and its place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from arriero.errors import ConfigError, did_you_mean
from arriero.settings.fields import field_paths
from arriero.settings.types import Mismatch, check_leaf, hints, is_table_list, parse_leaf, shown, type_name

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], source: str = "config") -> T:
    """Build a `cls` from nested dicts as TOML and JSON give them; `source` begins the error messages."""
    return build(cls, values, Where(source))


class Where:
    """Names the place of a key, as the beginning of a message: "run.toml, line 12: "."""

    def __init__(self, source: str = "", text: str = "") -> None:
        self.source, self.text = source, text

    def __call__(self, key: str) -> str:
        table, _, leaf = key.rpartition(".")
        current = ""
        for number, line in enumerate(self.text.split("\n"), start=1):
            if header := re.match(r"\s*\[+([^\]]*)\]", line):
                current = re.sub(r"[\s\"']", "", header[1])
                if current == key:
                    return f"{self.source}, line {number}: "
            elif assigned := re.match(r"\s*([\w.\"'-]+)\s*=", line):
                name = re.sub(r"[\"']", "", assigned[1])
                if (current == table and name == leaf) or name == key:
                    return f"{self.source}, line {number}: "
        return f"{self.source}: " if self.source else ""


def build(cls: type[T], values: Any, where: Where, prefix: str = "") -> T:
    """A `cls` of nested dicts. where: begins messages; prefix: of the keys, which those of a table within have.

    Raises `ConfigError` for unknown and missing keys, values of a wrong type, and what the class itself refuses.
    """
    known = hints(cls)
    if not isinstance(values, Mapping):
        key = prefix.removesuffix(".")
        raise ConfigError(f"{where(key)}{key} is {shown(values)}; it must be a table: [{key}]")
    for name in values:
        if name not in known:
            rest = _elsewhere(name, cls) or did_you_mean(name, known) or f"; known here: {', '.join(known)}"
            raise ConfigError(f"{where(prefix + name)}unknown key {prefix + name!r}{rest}")
    fields = {name: convert(known[name], value, prefix + name, where) for name, value in values.items()}
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    for name in required:
        if name not in fields:
            raise ConfigError(f"{where('')}the key {prefix + name!r} is missing; it must be {type_name(known[name])}")
    try:
        return cls(**fields)
    except ConfigError as error:
        named = next((name for name in values if re.search(rf"\b{name}\b", str(error))), "")
        raise ConfigError(f"{where((prefix + named).removesuffix('.'))}{error}") from error


def _elsewhere(name: str, cls: Any) -> str:
    """A hint for a key that exists in another table of the same file."""
    homes = [path for path in field_paths(cls) if path.endswith("." + name)]
    return f"; it belongs in the table [{homes[0].rpartition('.')[0]}]" if homes else ""


def convert(annotation: Any, value: Any, key: str, where: Where, text: bool = False) -> Any:
    """`value` as the annotated type; with `text`, a string is read as that type would be written."""
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):  # type: ignore[arg-type]
            return value
        return build(annotation, value, where, key + ".")  # type: ignore[arg-type]
    if is_table_list(annotation) and isinstance(value, list | tuple):
        return tuple(convert(get_args(annotation)[0], item, key, where) for item in value)
    if text and isinstance(value, str):
        value = parse_leaf(annotation, value)
    try:
        return check_leaf(annotation, value)
    except Mismatch:
        known = [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []
        near = did_you_mean(str(value), known)
        raise ConfigError(f"{where(key)}{key} is {shown(value)}; it must be {type_name(annotation)}{near}") from None
