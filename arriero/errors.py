"""The few exceptions that Arriero raises for its users.

Each message names the value, the rule it breaks and the remedy. The command line prints a `UserError`
without a traceback and exits with code 2; every other exception is our own bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """Something the user gave cannot be used; the text says what, why and how to mend it."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another."""


class DataError(UserError):
    """A data file or row cannot be used; the text names the file and the row."""


class CheckpointError(UserError):
    """A checkpoint, tokenizer or adapter is missing, damaged, or not what was asked for."""


class TrainingError(UserError):
    """Training cannot go on: the loss or gradients stayed non-finite, or the guard tripped."""


def check(ok: bool, message: str) -> None:
    """Raise a `ConfigError` unless a setting is `ok`."""
    if not ok:
        raise ConfigError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x' or 'y'?" for the known names nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or raise a `UserError` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the package '{module}', which is not installed; run: pip install 'arriero[{extra}]'"
        ) from error
