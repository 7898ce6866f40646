"""Frozen dataclasses to and from TOML (or JSON), and changes by name.

A configuration is plain data: the dataclass says which keys exist, of what type, and (in the string under each
field) what they mean. The file may leave out whatever keeps its default. Every refusal names the key, the
value, what was expected, and the file and line where that is known; the ranges are the dataclasses' own business,
checked when they are built. No torch here.

What a configuration does first when it is built, from a file, from flags or in Python, is `settle`: it expands "~" in
paths, and refuses numbers that are none.

Types understood: int, float, bool, str, Path, Literal, tuple, dict of such, Optional, nested dataclasses, and tuples
of dataclasses ([[tables]] in the file; not on the command line).
None has no TOML form: it is written and read as the string "none".
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import inspect
import json
import math
import re
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from arriero.errors import ConfigError, did_you_mean
from arriero.paths import as_path, expanded, hint

T = TypeVar("T")

RECIPE = "recipe"  # the top-level key that says which recipe a file configures
_WIDTH = 116  # columns of a comment in a written file
_SHOWN = 200  # characters of a value in a message
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how it begins


def load(cls: type[T], path: str | Path) -> T:
    """Read a `cls` from a TOML file, or a JSON file where the name ends in .json.

    Raises `ConfigError` for a missing or broken file, an unknown key or a value of the wrong type.
    """
    _, values, text = _read(as_path(path))
    return _build(cls, values, _Where(str(path), text))


def load_recipe(recipes: Mapping[str, type], path: str | Path) -> tuple[str, Any]:
    """Read a file whose key `recipe` names one of `recipes`; returns the name and the configuration."""
    name, values, text = _read(as_path(path))
    known = ", ".join(recipes)
    if name is None:
        raise ConfigError(
            f'{path}: the key "{RECIPE}" is missing; begin the file with: {RECIPE} = "{next(iter(recipes))}"'
        )
    if not isinstance(name, str) or name not in recipes:
        where = _Where(str(path), text)(RECIPE)
        raise ConfigError(f"{where}recipe {name!r} is unknown{did_you_mean(str(name), recipes)} (known: {known})")
    return name, _build(recipes[name], values, _Where(str(path), text))


def from_dict(cls: type[T], values: Mapping[str, Any], source: str = "config") -> T:
    """Build a `cls` from nested dicts as TOML and JSON give them; `source` begins the error messages."""
    return _build(cls, values, _Where(source))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and scalars only; the way back is `from_dict`."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def to_toml(config: Any, recipe: str | None = None) -> str:
    """The whole configuration as TOML, each key under its documentation; `load` reads it back equal."""
    lines = [f"{RECIPE} = {_toml(recipe)}", ""] if recipe else []
    lines += [*_comment(inspect.getdoc(type(config)) or ""), ""]
    lines += _toml_table(config, prefix="")
    return "\n".join(lines).rstrip() + "\n"


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


def settle(config: Any) -> None:
    """What a configuration's `__post_init__` does first, for its tables too: paths are expanded (`arriero.paths`).

    Raises `ConfigError` for numbers that no setting can be (not finite, or of more than 64 bits), and for text that is
    not UTF-8, which no file of settings could hold.
    """
    for name, value in _settled_fields(config, "").items():
        object.__setattr__(config, name, value)


def field_paths(cls: Any) -> Iterator[str]:
    """Dotted names of all leaves of a configuration class: "optim.lr"."""
    for name, annotation in _hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from (f"{name}.{inner}" for inner in field_paths(annotation))
        else:
            yield name


def field_docs(cls: Any) -> dict[str, str]:
    """What the string under each field of a dataclass says, on one line."""
    docs: dict[str, str] = {}
    bases: list[Any] = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    for base in bases:
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = _string(below)
                if text is not None:
                    docs[field.target.id] = " ".join(text.split())
    return docs


def is_table_list(annotation: Any) -> bool:
    """Whether a field holds any number of dataclasses: tuple[TrainingStage, ...], in the file [[stages]]."""
    args = get_args(annotation)
    return get_origin(annotation) is tuple and dataclasses.is_dataclass(args[0]) and args[-1] is Ellipsis


def _string(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


# ---- what every value has to be


def _settled_fields(config: Any, prefix: str) -> dict[str, Any]:
    """The fields that become another value."""
    changes = {}
    for name, annotation in _marked_hints(type(config)).items():  # type: ignore[arg-type]
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
            raise ConfigError(f"{key} is {_shown(leaf)}; a whole number has 64 bits at most")
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


# ---- reading


class _Where:
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
    """What a file says, its lines ended by newlines, without a byte order mark."""
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


def _build(cls: type[T], values: Any, where: _Where, prefix: str = "") -> T:
    hints = _hints(cls)
    if not isinstance(values, Mapping):
        key = prefix.removesuffix(".")
        raise ConfigError(f"{where(key)}{key} is {_shown(values)}; it must be a table: [{key}]")
    for name in values:
        if name not in hints:
            rest = _elsewhere(name, cls) or did_you_mean(name, hints) or f"; known here: {', '.join(hints)}"
            raise ConfigError(f"{where(prefix + name)}unknown key {prefix + name!r}{rest}")
    fields = {name: _convert(hints[name], value, prefix + name, where) for name, value in values.items()}
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    for name in required:
        if name not in fields:
            raise ConfigError(f"{where('')}the key {prefix + name!r} is missing; it must be {_name(hints[name])}")
    try:
        return cls(**fields)
    except ConfigError as error:
        named = next((name for name in values if re.search(rf"\b{name}\b", str(error))), "")
        raise ConfigError(f"{where((prefix + named).removesuffix('.'))}{error}") from error


def _elsewhere(name: str, cls: Any) -> str:
    """A hint for a key that exists in another table of the same file."""
    homes = [path for path in field_paths(cls) if path.endswith("." + name)]
    return f"; it belongs in the table [{homes[0].rpartition('.')[0]}]" if homes else ""


def _convert(annotation: Any, value: Any, key: str, where: _Where, text: bool = False) -> Any:
    """`value` as the annotated type; with `text`, a string is read as that type would be written."""
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):  # type: ignore[arg-type]
            return value
        return _build(annotation, value, where, key + ".")  # type: ignore[arg-type]
    if is_table_list(annotation) and isinstance(value, list | tuple):
        return tuple(_convert(get_args(annotation)[0], item, key, where) for item in value)
    if text and isinstance(value, str):
        value = _parse(annotation, value)
    try:
        return _check(annotation, value)
    except _Mismatch:
        known = [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []
        near = did_you_mean(str(value), known)
        raise ConfigError(f"{where(key)}{key} is {_shown(value)}; it must be {_name(annotation)}{near}") from None


class _Mismatch(Exception):
    pass


def _shown(value: Any) -> str:
    """A value in a message: as TOML has it where Python writes it otherwise, and not more of it than one reads."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _check(annotation: Any, value: Any) -> Any:
    """`value` as a leaf of the annotated type, or `_Mismatch`. A bool is no number; an int may stand for a float."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _check_union(args, value)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise _Mismatch
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise _Mismatch
        return tuple(_check(kind, item) for kind, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _check(args[1], v) for k, v in value.items()}
    if annotation is Path and isinstance(value, str | Path):
        return Path(value)
    if annotation is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _Mismatch from None
    if origin is None and type(value) is annotation:
        return value
    raise _Mismatch


def _check_union(kinds: tuple[Any, ...], value: Any) -> Any:
    if type(None) in kinds and (value is None or value == "none"):
        return None
    for kind in sorted(kinds, key=lambda k: k is float):  # an int is itself first, a float only at need
        try:
            return _check(kind, value)
        except _Mismatch:
            continue
    raise _Mismatch


def _parse(annotation: Any, text: str) -> Any:
    """Read the text of an override; what cannot be read is left as it is, for `_check` to refuse."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for kind in sorted(args, key=lambda k: k is str):
            if kind is not type(None) and type(parsed := _parse(kind, text)) is not str:
                return parsed
        return text
    if origin is Literal:
        return next((choice for choice in args if str(choice) == text), text)
    if origin is tuple and not text.lstrip().startswith("["):
        kinds = args if args[-1] is not Ellipsis else (args[0],) * len(text.split(","))
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return (
            tuple(_parse(k, p) for k, p in zip(kinds, parts, strict=False))
            if len(kinds) == len(parts) or not parts
            else text
        )
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


# ---- changing


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
    for name, annotation in _hints(type(config)).items():
        key = prefix + name
        if key in changes:
            fields[name] = _convert(annotation, changes[key], key, _Where(), text=True)
        elif any(path.startswith(key + ".") for path in changes):
            fields[name] = _replace(getattr(config, name), changes, key + ".")
    return dataclasses.replace(config, **fields)


# ---- writing


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


# ---- types


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


@functools.cache
def _marked_hints(cls: Any) -> dict[str, Any]:
    """The same with what marks a path."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _name(annotation: Any) -> str:
    """A type in a user's words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join('"none"' if kind is type(None) else _name(kind) for kind in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if origin is tuple:
        return (
            f"a list of {_plural(args[0])}"
            if args[-1] is Ellipsis
            else f"a list of {len(args)}: {', '.join(map(_name, args))}"
        )
    if origin is dict:
        return f"a table of {_plural(args[1])}"
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
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(annotation, f"{_name(annotation)} each")
