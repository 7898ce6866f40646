"""Derives a command's arguments from its parameters; the only importer of tyro.

Required parameters become positional arguments, keyword ones flags. A command with one parameter `config` has that
dataclass's fields as flags, without their sections: --lr, not --optim.lr (both are accepted). A command that trains
accepts a preset or a settings file in the model's place, whose settings the flags change; one with `recipe` and
`config` accepts nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from arriero import presets, settings
from arriero.cli.data import curate
from arriero.errors import ConfigError, UserError
from arriero.io.paths import PathText, expand, expanded
from arriero.train.recipes import RECIPES as TRAINING

REQUIRED = ("model", "data", "train")
TYPOGRAPHIC_FLAG = re.compile(
    r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d][-\u2010-\u2015\u2212]?([a-z][\w.-]*(?:=.*)?)", re.S
)


def call(name: str, command: Callable[..., Any], args: list[str]) -> None:
    """Parse `args` by the command's parameters and run it."""
    _refuse_misread(args)
    hints = get_type_hints(command)
    if "config" not in hints:
        _tyro(command, _binder(command), name, args)()
    elif "recipe" in hints:
        _call_with_settings(name, command, args)
    elif hints["config"] in TRAINING.values() and args and presets.is_settings(args[0]):
        command(_changed(name, command, args, *presets.load(args[0])))
    else:
        command(_tyro(command, hints["config"], name, args))


def _refuse_misread(args: Sequence[str]) -> None:
    """Raise for what would be taken for something else in silence; behind "--" all is text."""
    given = set()
    for word in args[: args.index("--")] if "--" in args else args:
        if typed := TYPOGRAPHIC_FLAG.fullmatch(word):
            raise UserError(
                f"{word}: begins with a typographic dash (U+{ord(word[0]):04X}); type --{typed[1]}, or, where it is no "
                "flag, put -- before it"
            )
        if flag := re.match(r"--(?:no-)?([\w.-]+)(?:=|$)", word):
            name = flag[1].rpartition(".")[2].replace("_", "-")
            if name in given:
                raise UserError(
                    f"--{name} is given twice, and one alone would count; give it once, with all values where it "
                    "takes several"
                )
            given.add(name)


def _call_with_settings(name: str, command: Callable[..., Any], args: list[str]) -> None:
    """Run a command on the recipe and the settings that args[0] names."""
    if not args or args[0].startswith("-"):
        print(f"usage: arriero {name} FILE [OPTIONS]\n\n{description(command)}\n")
        print(f"OPTIONS are the recipe's settings: arriero {name} FILE --help lists them with the file's values.")
        if not args or args[0] not in ("-h", "--help"):
            raise UserError(f"{name}: the first argument must be a file as `arriero cp` writes it, or a preset")
        return
    recipe, config = presets.load(args[0])
    if recipe == "curate" and name == "run":  # its steps share names of settings, so its fields cannot be flags
        call("curate", curate, ["--preset", *args])
    else:
        command(recipe, _changed(name, command, args, recipe, config))


def _changed(name: str, command: Callable[..., Any], args: list[str], recipe: str, config: Any) -> Any:
    """The configuration that args[0] holds, changed by the flags after it."""
    wanted = get_type_hints(command)["config"] if name != "plan" else None
    if recipe not in TRAINING or (wanted in TRAINING.values() and type(config) is not wanted):
        raise ConfigError(f"{args[0]} configures {recipe}, which is nothing to {name}: arriero run {args[0]}")
    if name.split()[0] == "plan" and args[0] in presets.PRESETS:
        config = presets.without_absent_data(config)
    return _tyro(command, type(config), f"{name} {args[0]}", args[1:], default=config)


def _tyro(command: Callable[..., Any], target: Any, name: str, args: list[str], default: Any = None) -> Any:
    """Let tyro read `args` for `target`: a dataclass, which gives its instance, or what `_binder` makes."""
    import tyro

    from_file = default is not None
    if default is None and inspect.isclass(target):
        default = target()
    registry = tyro.constructors.ConstructorRegistry()
    required = ("model",) if name.split()[0] == "plan" else REQUIRED  # arithmetic needs no data
    registry.struct_rule(functools.partial(_config_fields, from_file=from_file, required=required))
    return tyro.cli(
        target,
        prog=f"arriero {name}",
        description=description(command),
        args=[re.sub(r"^--[\w-]+\.(?=\w)", "--", arg) for arg in args],  # --optim.lr is --lr
        default=tyro.MISSING_NONPROP if default is None else default,
        registry=registry,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.PositionalMetavarFromFieldName,
            *(() if default else (tyro.conf.FlagCreatePairsOff,)),  # --no-... where a setting may be on already
        ),
    )


def _binder(command: Callable[..., Any]) -> Callable[..., Callable[[], None]]:
    """A function of the command's signature that returns the call instead of making it.

    Called inside tyro, a command that raised a ValueError of its own would be reported as a misread flag.
    """
    import tyro

    signature, marked = inspect.signature(command), get_type_hints(command, include_extras=True)
    hints = {name: _as_text(hint) for name, hint in get_type_hints(command).items()}
    for name, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            hints[name] = Annotated[hints[name], tyro.conf.Positional]

    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            given.arguments[name] = _read_path(marked[name], value, name)
        return functools.partial(command, *given.args, **given.kwargs)

    bind.__doc__, bind.__annotations__ = command.__doc__, hints
    bind.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    return bind


def _as_text(hint: Any) -> Any:
    """The type that tyro reads for one with a `Path`: text, since Path("") would be this directory."""
    if hint is Path:
        return str
    return str | None if Path in get_args(hint) else hint


def _read_path(hint: Any, value: Any, name: str) -> Any:
    """What was given for a parameter, as the path that it is, if it is one."""
    is_path = hint is Path or Path in get_args(hint)
    if value == "" and (is_path or hint is PathText or PathText in get_args(hint)):
        raise ConfigError(f"{name.replace('_', '-')} is empty; name a file or a directory")
    return Path(expand(value)) if is_path and isinstance(value, str) else expanded(hint, value)


def _config_fields(info: Any, from_file: bool, required: Sequence[str]) -> Any:
    """How tyro shows a configuration: its documentation as help, MODEL by position, the training data as --data.

    What is `required` has to be given where its default is empty (""); a file may have given it already.
    """
    import tyro
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    cls: Any = info.type
    if not dataclasses.is_dataclass(cls):
        return None
    docs, fields = settings.field_docs(cls), []
    for name, kind in get_type_hints(cls).items():
        value = getattr(info.default, name)
        if settings.is_table_list(kind):
            kind = Annotated[kind, tyro.conf.Suppress]  # [[tables]] stand in a file
        elif name in ("data", "train") and kind is str:
            kind = Annotated[kind, tyro.conf.arg(name="data", aliases=["--train"] if name == "train" else [])]
        elif name in ("model", "prompt") and not from_file:
            kind = Annotated[kind, tyro.conf.Positional]
        missing = name in required and value in ("", ())
        fields.append(StructFieldSpec(name, kind, tyro.MISSING if missing else value, docs.get(name)))
    return StructConstructorSpec(info.type, tuple(fields))


def description(command: Callable[..., Any]) -> str:
    """A command's docstring without its list of arguments, which tyro shows beside the flags."""
    return (inspect.getdoc(command) or "").partition("\nArgs:")[0].rstrip()
