"""Checks that hold for every value of a configuration: finite, of 64 bits, UTF-8; and expands paths."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from arriero.errors import ConfigError
from arriero.io.paths import expanded
from arriero.settings.types import marked_hints, shown


def settle(config: Any) -> None:
    """What a configuration's `__post_init__` does first, for its tables too: paths are expanded (`arriero.io.paths`).

    Raises `ConfigError` for numbers that no setting can be (not finite, or of more than 64 bits), and for text that is
    not UTF-8, which no file of settings could hold.
    """
    for name, value in _settled_fields(config, "").items():
        object.__setattr__(config, name, value)


def _settled_fields(config: Any, prefix: str) -> dict[str, Any]:
    """The fields that become another value."""
    changes = {}
    for name, annotation in marked_hints(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        settled = _settled(annotation, value, prefix + name)
        if settled is not value and settled != value:
            changes[name] = settled
    return changes


def _settled(annotation: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = _settled_fields(value, key + ".")
        return dataclasses.replace(value, **changes) if changes else value
    for leaf in _leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ConfigError(f"{key} is {leaf}; it must be a finite number")
        if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
            raise ConfigError(f"{key} is {shown(leaf)}; a whole number has 64 bits at most")
        if isinstance(leaf, str) and re.search("[\ud800-\udfff]", leaf):
            raise ConfigError(
                f"{key} is {leaf!a}, which is not UTF-8, so no file of settings could hold it; give another name: "
                "rename what it names, or link to it"
            )
    return expanded(annotation, value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
