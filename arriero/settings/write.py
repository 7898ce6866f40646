"""Writes a configuration as nested dicts, and as TOML with each key under its documentation."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.settings.fields import field_docs

RECIPE = "recipe"  # the top-level key that says which recipe a file configures
_WIDTH = 116  # columns of a comment in a written file


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and scalars only; the way back is `from_dict`."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def to_toml(config: Any, recipe: str | None = None) -> str:
    """The whole configuration as TOML, each key under its documentation; `load` reads it back equal."""
    lines = [f"{RECIPE} = {_toml(recipe)}", ""] if recipe else []
    lines += [*_comment(inspect.getdoc(type(config)) or ""), ""]
    lines += _toml_table(config, prefix="")
    return "\n".join(lines).rstrip() + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _toml_table(config: Any, prefix: str) -> list[str]:
    """Leaves first, then tables: TOML gives everything after a header to that table."""
    docs = field_docs(type(config))
    lines: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            key = prefix + field.name
            tables += ["", *_comment(docs.get(field.name) or inspect.getdoc(type(value)) or ""), f"[{key}]"]
            tables += _toml_table(value, key + ".")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            key = prefix + field.name
            tables += ["", *_comment(docs.get(field.name, ""))]
            for item in value:
                tables += [f"[[{key}]]", *_toml_table(item, key + "."), ""]
        else:
            lines += [*_comment(docs.get(field.name, "")), f"{field.name} = {_toml(value)}"]
    return lines + tables


def _comment(text: str) -> list[str]:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return ["# " + line for line in textwrap.wrap(paragraph, _WIDTH)]


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    assert isinstance(value, int), value
    return str(value)
