"""Reads entries of a JSON configuration by type and range; a wrong one is refused by name.

As in transformers, true is not accepted as 1, 64.0 not as 64 and "4" not as 4; null counts as absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from arriero.errors import CheckpointError, ConfigError
from arriero.show.terminal import warn_once

LARGEST = 2**31 - 1  # of a size or position: what 32 bits hold


class Fields(Mapping[str, Any]):
    """The entries of a JSON object that are not null. file: for messages. name: of a group within it, or empty."""

    def __init__(self, values: Mapping[str, Any], file: str, name: str = "") -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self.file, self.name = file, name

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self._wrong(name, value, f"a whole number from {least} to {LARGEST:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; `default` may be any."""
        value = self._value(name, default)
        if name in self and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
            raise self._wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def group(self, name: str) -> Fields:
        """An object within this one, empty where there is none."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object of names and values")
        return Fields(value, self.file, name)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Within it, numbers that do not fit each other (`ConfigError`) are the file's fault (`CheckpointError`)."""
        try:
            yield
        except ConfigError as error:
            raise CheckpointError(f"{self.file}: {str(error).removeprefix('model: ')}") from error

    def disagree(self, values: str, rule: str) -> None:
        """Say that two entries differ, and which one counts."""
        warn_once(f"{self.file}: {values}; {rule}, as in transformers")

    def _value(self, name: str, default: Any) -> Any:
        if name not in self and default is None:
            raise CheckpointError(f"{self.file}: the entry {self._full(name)!r} is missing; copy or download it again")
        return self.get(name, default)

    def _full(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _wrong(self, name: str, value: Any, rule: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {self._full(name)} is {shown(value)}; it must be {rule}: correct it, or copy the file again"
        )


def shown(value: Any) -> str:
    """A value as text for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 120 else text[:117] + "..."


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False
