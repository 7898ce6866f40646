"""A Jinja sandbox for untrusted templates: limits time and memory, and denies access to Python objects.

A chat template comes with a model, so anybody may have written it. Jinja's own sandbox prevents changes to the
arguments and access to names that begin with an underscore, but a template can still loop for ever, fill the memory,
and read attributes of any object that it gets. Here
- an attribute can be read only where it is listed, for JSON's types and Jinja's own helpers (`_ATTRIBUTES`);
- each iteration, call, filter and test checks the time (`_step`);
- each text and list is charged by its size to a budget, large ones before they are made (`_pay`); the remaining Python
  operations take time in proportion to their arguments;
- filters that no chat template needs (wordwrap, urlize, random and the like) are undefined.

Price: about a fifth of a rendering (docs/log.md); the clock is read at every sixteenth step.
"""

from __future__ import annotations

import functools
import json
import re
import string
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.filters import make_attrgetter
from jinja2.runtime import BlockReference, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

SECONDS = 1.0  # of computing by this thread that one rendering may take
UNITS = 2**22  # characters that one rendering may make, all intermediate texts counted
UNITS_EACH = 256  # further ones for each character of the messages and tools
SHORT = 1000  # characters of a text that is free
OBJECT = 16  # units of an element: what it takes beside its characters
SOURCE = 100_000  # characters of a template
WIDE = 1000  # columns that a format may ask for
LONG = 100_000  # elements, as Jinja's sandbox allows a range

_TEXT = frozenset(
    [
        *["capitalize", "casefold", "center", "count", "encode", "endswith", "expandtabs", "find", "index", "isalnum"],
        *["isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable"],
        *["isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix"],
        *["removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split"],
        *["splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill"],
    ]
)
_NUMBER = frozenset(["real", "imag", "numerator", "denominator", "bit_length", "is_integer", "conjugate"])
# What a template may read of an object, by its type; nothing of any other. `format` is Jinja's to wrap.
_ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _TEXT,
    Markup: _TEXT | {"unescape"},
    list: frozenset(["count", "index", "copy"]),
    tuple: frozenset(["count", "index"]),
    dict: frozenset(["get", "items", "keys", "values", "copy"]),
    int: _NUMBER,
    bool: _NUMBER,
    float: _NUMBER,
    LoopContext: frozenset(
        [
            *["index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"],
            *["previtem", "nextitem", "cycle", "changed"],
        ]
    ),
    Cycler: frozenset(["next", "current", "reset", "items", "pos"]),
    Joiner: frozenset(["sep", "used"]),
    Macro: frozenset(["name", "arguments", "catch_kwargs", "catch_varargs", "caller"]),
    BlockReference: frozenset(["super"]),
    TemplateReference: frozenset(),
}

_FILTERS = (
    *("abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "forceescape", "format", "groupby", "indent", "int", "items", "last", "length", "list", "lower", "map"),
    *("max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice"),
    *("sort", "string", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount"),
)

# A conversion of "%" whose width or precision has more than four digits, or is an argument.
_WIDE_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(?:\d{5,}|\*|\d*\.(?:\d{5,}|\*))")


class RunawayTemplate(jinja2.TemplateError):
    """A template took more time, or made more text, than any conversation needs."""


class Budget:
    """What is left to one rendering. Time is its thread's own, so that a busy machine costs none."""

    __slots__ = ("given", "processor", "steps", "units", "until")

    def __init__(self, given: Any = None) -> None:
        """given: what is rendered; its size is taken when the allowance is spent, which hardly ever happens."""
        self.given = given
        self.units = UNITS
        self.steps = 0
        self.until = time.monotonic() + SECONDS
        self.processor = time.thread_time()

    def look(self) -> None:
        """Raise RunawayTemplate when the time is over."""
        if time.monotonic() > self.until:
            used = time.thread_time() - self.processor
            if used > SECONDS:
                raise RunawayTemplate(f"it runs for more than {SECONDS:g} s")
            self.until = time.monotonic() + SECONDS - used

    def pay(self, units: int) -> None:
        """Take units for what is made, or about to be; raises RunawayTemplate when there are none left."""
        self.units -= units
        if self.units < 0:
            if self.given is not None:
                self.units += UNITS_EACH * sum(_sizes(self.given))
                self.given = None
            if self.units < 0:
                raise RunawayTemplate(f"it makes more than {UNITS:,} characters")


class _Here(threading.local):
    budget = Budget()


_here = _Here()


def begin(given: Any) -> None:
    """Start a budget in this thread, for a rendering of `given` (messages and tools)."""
    _here.budget = Budget(given)


def _step() -> None:
    """Count a step; the clock is looked at in every sixteenth."""
    budget = _here.budget
    budget.steps += 1
    if not budget.steps & 15:
        budget.look()


def _pay(units: int) -> None:
    _here.budget.pay(units)


def _paid(value: Any) -> Any:
    """Return a value that was made, paid for by its length.

    Short texts are free: only a list, or a longer text, could keep many of them, and these are not.
    """
    kind = type(value)
    if kind is str or kind is Markup:
        if len(value) > SHORT:
            _here.budget.pay(len(value))
    elif kind is list or kind is tuple or kind is dict:
        _here.budget.pay(OBJECT * len(value))
    return value


def _made(value: Any) -> Any:
    """Return a list, tuple or dict that may hold others more than once, paid for as if it were written out.

    Each nesting may double what the next one holds; written out, or compared, that would be without bound.
    """
    pay = _here.budget.pay
    for size in _sizes(value):
        pay(size)
    return value


def _sizes(value: Any) -> Iterator[int]:
    """Yield the units of everything in a value of JSON's types, however deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (str, bytes)):
            yield OBJECT + len(item)
            continue
        yield OBJECT
        if isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox within a budget; `extensions` are tags of ours."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, extensions: Iterable[Any] = ()) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=_as_text, extensions=list(extensions))
        self.code_generator_class = _Generator
        own = {"join": _join, "sum": _sum, "tojson": _tojson}
        filters = {name: self.filters[name] for name in _FILTERS} | own
        self.filters = {name: _bounded_filter(name, function) for name, function in filters.items()}
        self.tests = {name: _stepping(function) for name, function in self.tests.items()}
        helpers = {name: self.globals[name] for name in ("range", "cycler", "joiner")}
        self.globals = {**helpers, "dict": _new_dict, "namespace": _Namespace}
        self.concat = _concatenated  # type: ignore[method-assign]

    def load(self, source: str) -> jinja2.Template:
        """Compile a template. Raises jinja2.TemplateError for one that is none, whatever is wrong with it."""
        if len(source) > SOURCE:
            raise RunawayTemplate(f"it has {len(source):,} characters; more than {SOURCE:,} are not read")
        begin(None)  # constant parts are computed while compiling
        try:
            return self.from_string(source)
        except jinja2.TemplateError:
            raise
        except Exception as error:  # Python's compiler has limits of its own: nesting, length of numbers
            raise jinja2.TemplateError(f"it cannot be compiled ({type(error).__name__}: {error})") from error

    # What compiled templates use.

    @property
    def tick(self) -> bool:
        """Count a step of a loop."""
        _step()
        return True

    made = staticmethod(_made)

    @staticmethod
    def joined(parts: Iterable[Any]) -> str:
        """Return the texts of the parts of `a ~ b`, one after the other."""
        texts = [part if type(part) is str else _as_text(part) for part in parts]
        size = sum(map(len, texts))
        if size > SHORT:
            _here.budget.pay(size)
        return "".join(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read this attribute, which exists."""
        kind = type(obj)
        if kind is _Namespace:
            return not attr.startswith("_")
        return attr in _ATTRIBUTES.get(kind, ())

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left + right, left * right, left ** right or left % right."""
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 4096:
                raise RunawayTemplate("it computes numbers of more than 4,096 bits")
        elif operator == "%" and isinstance(left, str):
            _check_conversions(left)
        result = self.binop_table[operator](left, right)
        return _made(result) if isinstance(result, (list, tuple)) else _paid(result)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a helper or a method."""
        _step()
        owner = getattr(__obj, "__self__", None)  # no need to ask whether it is safe: others cannot be reached
        if isinstance(owner, str):
            args = _before_method(owner, __obj.__name__, args)
        elif isinstance(__obj, Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            _made((args, kwargs))
        return _paid(__context.call(__obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what "...".format is to a template, or None for any other value."""
        text = getattr(value, "__self__", None)
        if not isinstance(text, str) or value.__name__ not in ("format", "format_map"):
            return None
        formatter = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)
        if value.__name__ == "format_map":
            return lambda names: _paid(type(text)(formatter.vformat(text, (), names)))
        return lambda *args, **names: _paid(type(text)(formatter.vformat(text, args, names)))


class _Generator(CodeGenerator):
    """Jinja's compiler, which writes the counting into loops, literals and `~`."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        tick = nodes.EnvironmentAttribute("tick")
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, which Python itself may look up."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # Jinja's way to leave `self` free as a name
        self, args = args[0], args[1:]
        names = dict(*args, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace takes no attribute {name!r}")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return _made(dict(*args, **kwargs))


class _FormatsNarrowly(string.Formatter):
    """A formatter that refuses columns by the thousand."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{5,}", format_spec):
            raise RunawayTemplate(f"it formats to {format_spec!r}")
        return super().format_field(value, format_spec)


class _Formatter(_FormatsNarrowly, SandboxedFormatter):
    pass


class _EscapeFormatter(_FormatsNarrowly, SandboxedEscapeFormatter):
    pass


def _as_text(value: Any) -> Any:
    """Return what `{{ value }}` writes."""
    return value if type(value) is str else _paid(str(value))


def _concatenated(parts: Iterable[str]) -> str:
    pieces, unpaid = [], 0
    for part in parts:
        pieces.append(part)
        unpaid += len(part)
        if unpaid > SHORT:
            _pay(unpaid)
            unpaid = 0
    return "".join(pieces)


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > 4096:
            raise RunawayTemplate("it computes numbers of more than 4,096 bits")
        return
    for times, what in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(what, (str, bytes, list, tuple)):
            _pay(max(0, times) * len(what) * (1 if isinstance(what, (str, bytes)) else OBJECT))


def _check_conversions(text: str) -> None:
    if _WIDE_CONVERSION.search(text):
        raise RunawayTemplate("it formats to columns by the thousand, or to a computed number of them")


def _check_count(what: str, number: Any, most: int) -> None:
    if isinstance(number, (int, float)) and abs(number) > most:
        raise RunawayTemplate(f"{what} is {number:.3g}; at most {most:,} make sense")


def _before_method(text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pay for what a method of a text makes beyond its own length; returns the arguments to call it with."""
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_count(f"{name}'s width", args[0] if args else 0, WIDE)
        _pay(WIDE * text.count("\t") if name == "expandtabs" else 0)
    elif name == "replace" and len(args) >= 2:
        _pay_for_replacing(text, args[0], args[1])
    elif name == "join" and len(args) == 1:
        return (_pay_for_joining(text, args[0]),)
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args and name != "splitlines" else None
        n_parts = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
        _pay(OBJECT * n_parts)
    return args


def _pay_for_replacing(text: str, old: Any, new: Any) -> None:
    old, new = str(old), str(new)
    if len(new) > len(old):
        _pay(text.count(old) * (len(new) - len(old)))


def _pay_for_joining(separator: str, parts: Any) -> list[Any]:
    found = []
    for part in parts:
        _pay(OBJECT + len(separator) + (len(part) if isinstance(part, str) else 0))
        found.append(part)
    return found


# Filters


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts a step and pays for its result."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # index of the filtered value among the arguments
    before = _BEFORE_FILTER.get(name)
    nests, generates = name in ("list", "groupby"), name in _GENERATING

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _step()
        if before is not None:
            before(*args[at:], **kwargs)
        result = function(*args, **kwargs)
        if generates:
            return _stepped(result)
        return _made(result) if nests else _paid(result)

    return bounded


def _stepped(parts: Iterator[Any]) -> Iterator[Any]:
    for part in parts:
        _step()
        yield _made(part) if type(part) is list else part  # batch and slice fill lists with one element


def _stepping(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        _step()
        return function(*args, **kwargs)

    return stepping


def _before_listing(value: Any = (), *args: Any, **kwargs: Any) -> None:
    if isinstance(value, (str, list, tuple, dict)):
        _pay(OBJECT * len(value))  # an object of each element is made before any is paid for


def _before_center(value: Any, width: Any = 80) -> None:
    _check_count("center's width", width, WIDE)


def _before_indent(value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    _check_count("indent's width", width, WIDE)
    columns = len(width) if isinstance(width, str) else max(0, int(width))
    _pay(columns * (1 + str(value).count("\n")) + len(str(value)))


def _before_format(value: Any, *args: Any, **kwargs: Any) -> None:
    _check_conversions(str(value))


def _before_replace(value: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    _pay_for_replacing(str(value), old, new)


def _before_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    _check_count("round's precision", precision, 308)


def _before_rows(value: Any, n: Any = 0, fill_with: Any = None) -> None:
    _check_count("a row's length", n, LONG)
    _before_listing(value)


_BEFORE_FILTER: dict[str, Callable[..., None]] = {
    **dict.fromkeys(["list", "sort", "unique", "reverse", "groupby", "dictsort", "items"], _before_listing),
    "center": _before_center,
    "indent": _before_indent,
    "format": _before_format,
    "replace": _before_replace,
    "round": _before_round,
    "batch": _before_rows,
    "slice": _before_rows,
}
_GENERATING = frozenset(["map", "select", "reject", "selectattr", "rejectattr", "unique", "batch", "slice", "items"])


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Jinja's join, which would make the whole text before it could be paid for."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    texts = (str(part) for part in value)
    return str(d).join(_pay_for_joining(str(d), texts))


@jinja2.pass_environment
def _sum(environment: Any, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's sum, of which each step is paid for: lists may be summed too."""
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    total = start
    for item in iterable:
        _step()
        total = environment.call_binop(None, "+", total, item)
    return total


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, as in transformers; Jinja's own filter escapes HTML's characters."""
    wide = len(indent) if isinstance(indent, str) else indent or 0
    for width in (wide, *map(len, separators or ())):
        _check_count("tojson's indent or separator", width, 100)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
