"""Reads a configuration from a TOML file, or from a JSON file if the name ends in .json."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from arriero.errors import ConfigError, did_you_mean
from arriero.io.paths import as_path, hint
from arriero.settings.build import Where, build
from arriero.settings.write import RECIPE

T = TypeVar("T")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how it begins


def load(cls: type[T], path: str | Path) -> T:
    """Read a `cls` from a TOML file, or a JSON file where the name ends in .json.

    Raises `ConfigError` for a missing or broken file, an unknown key or a value of the wrong type.
    """
    _, values, text = _read(as_path(path))
    return build(cls, values, Where(str(path), text))


def load_recipe(recipes: Mapping[str, type], path: str | Path) -> tuple[str, Any]:
    """Read a file whose key `recipe` names one of `recipes`; returns the name and the configuration."""
    name, values, text = _read(as_path(path))
    known = ", ".join(recipes)
    if name is None:
        raise ConfigError(
            f'{path}: the key "{RECIPE}" is missing; begin the file with: {RECIPE} = "{next(iter(recipes))}"'
        )
    if not isinstance(name, str) or name not in recipes:
        where = Where(str(path), text)(RECIPE)
        raise ConfigError(f"{where}recipe {name!r} is unknown{did_you_mean(str(name), recipes)} (known: {known})")
    return name, build(recipes[name], values, Where(str(path), text))


def _read(path: Path) -> tuple[str | None, dict[str, Any], str]:
    """The recipe's name, the values without it, and (for TOML, where lines matter) the text."""
    text = _text(path)
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        values = json.loads(text, object_pairs_hook=_named_once) if kind == "JSON" else tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: not valid {kind}: tables or lists within each other without end") from None
    except ValueError as error:  # TOMLDecodeError and JSONDecodeError are such, and so is a number of 5,000 digits
        why = str(error).replace("Cannot overwrite a value", "a key is given twice")
        raise ConfigError(f"{path}: not valid {kind}: {why}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; it must be one table of keys and values")
    return values.pop(RECIPE, None), values, "" if path.suffix == ".json" else text


def _text(path: Path) -> str:
    """The text of a file with lines ended by newlines, without a byte order mark."""
    try:
        data = path.read_bytes()
        if data.startswith(_UTF16) or b"\0" in data[:100]:
            raise ConfigError(f"{path}: cannot be read as a text file: it is UTF-16; save it as UTF-8")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; `arriero ls presets` lists what `arriero cp PRESET {path}` can write{hint(path)}"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: cannot be read as a text file: not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names may be given once each, as in TOML."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return values
