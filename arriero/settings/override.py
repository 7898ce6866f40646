"""A copy of a configuration with some fields changed, by name, as flags do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from arriero.errors import ConfigError, did_you_mean
from arriero.settings.build import Where, convert
from arriero.settings.fields import field_paths
from arriero.settings.types import hints

T = TypeVar("T")


def apply_overrides(config: T, overrides: Mapping[str, Any]) -> T:
    """A copy with some fields changed: {"optim.lr": "3e-4"}, or {"lr": 3e-4} where only one field has that name.

    Strings are read as the field's type; other values must have it. Hyphens count as underscores.
    Raises `ConfigError` for unknown or ambiguous names and for values of the wrong type.
    """
    paths = list(field_paths(type(config)))
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        path = _find(name.replace("-", "_"), paths)
        changes[path] = value
    return _replace(config, changes, prefix="")


def _find(name: str, paths: list[str]) -> str:
    if name in paths:
        return name
    found = [path for path in paths if path.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{name!r} is the name of several settings; write one of {', '.join(found)}")
    known = [*paths, *(path.rpartition(".")[2] for path in paths)]
    raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, dict.fromkeys(known))}")


def _replace(config: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    """Rebuild from the inside out, each dataclass once, so that its own checks see all changes together."""
    fields = {}
    for name, annotation in hints(type(config)).items():
        key = prefix + name
        if key in changes:
            fields[name] = convert(annotation, changes[key], key, Where(), text=True)
        elif any(path.startswith(key + ".") for path in changes):
            fields[name] = _replace(getattr(config, name), changes, key + ".")
    return dataclasses.replace(config, **fields)
