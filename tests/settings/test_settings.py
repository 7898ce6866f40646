"""Settings survive the way to a file and back, and every mistake in them is named with its place and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.curate.config import CurateConfig
from arriero.errors import ConfigError
from arriero.eval.config import EvalConfig, NeedleConfig, PassConfig
from arriero.infer.config import ChatConfig, GenerateConfig
from arriero.settings import (
    apply_overrides,
    field_docs,
    field_paths,
    from_dict,
    load,
    load_recipe,
    settle,
    to_dict,
    to_toml,
)
from arriero.train.config import PretrainConfig, SftConfig
from arriero.train.scaling.config import SweepConfig


@dataclass(frozen=True)
class Inner:
    """A table within."""

    rate: float = 0.5
    """Steps in a metre."""
    names: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    kind: Literal["round", "square", "oval"] = "round"
    shares: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    """Everything a setting can be.

    A second paragraph, which no comment repeats.
    """

    count: int = 3
    flag: bool = False
    title: str = ""
    """What it is called,
    on two lines."""
    place: Path = Path("here")
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    share: str | float = "all"
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count is {self.count}; it must be at least 0")


floats = st.floats(allow_nan=False)
inners = st.builds(
    Inner,
    rate=floats,
    names=st.lists(st.text(), max_size=3).map(tuple),
    sizes=st.dictionaries(st.text(), st.integers(), max_size=3),
    shares=st.dictionaries(st.integers(), floats, max_size=3),
    kind=st.sampled_from(["round", "square", "oval"]),
)
outers = st.builds(
    Outer,
    count=st.integers(min_value=0),
    flag=st.booleans(),
    title=st.text(),
    place=st.text(min_size=1).map(Path),
    pair=st.tuples(st.integers(), floats),
    limit=st.none() | st.integers(),
    share=st.text() | floats,
    inner=inners,
)


@settings(deadline=None)
@given(outers)
def test_toml_gives_back_the_same_settings(tmp_path_factory: pytest.TempPathFactory, config: Outer) -> None:
    file = tmp_path_factory.mktemp("toml") / "a.toml"
    file.write_bytes(to_toml(config).encode())
    assert load(Outer, file) == config


@settings(deadline=None)
@given(outers)
def test_json_gives_back_the_same_settings(config: Outer) -> None:
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


def test_a_written_file_explains_every_documented_setting() -> None:
    text = to_toml(Outer(), recipe="shape")
    assert text.startswith('recipe = "shape"\n\n# Everything a setting can be.\n')
    assert '# What it is called, on two lines.\ntitle = ""\n' in text
    assert "# A table within.\n[inner]\n# Steps in a metre.\nrate = 0.5\n" in text
    assert 'limit = "none"\n' in text


@pytest.mark.parametrize("key", ["05", "five", "1.0", ""])
def test_a_number_as_a_key_is_written_as_a_number(key: str) -> None:
    with pytest.raises(ConfigError, match="it must be a table of numbers, each under a whole number"):
        from_dict(Inner, {"shares": {key: 1.0}})


def test_a_file_may_leave_out_what_keeps_its_default(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[inner]\nrate = 7\n")
    assert load(Outer, tmp_path / "a.toml") == Outer(inner=Inner(rate=7.0))


def refused(config: type, file: Path, text: str) -> str:
    """The refusal of a file of settings, which begins with the file's name."""
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(config, file)
    assert str(error.value).startswith(str(file))
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\ncuont = 3", "a.toml, line 2: unknown key 'cuont'; did you mean 'count'?"),
        ("rate = 3.0", "a.toml, line 1: unknown key 'rate'; it belongs in the table [inner]"),
        ("[inner]\n\nraet = 3.0", "a.toml, line 3: unknown key 'inner.raet'; did you mean 'rate'?"),
        (
            "qqq = 1",
            "a.toml, line 1: unknown key 'qqq'; known here: count, flag, title, place, pair, limit, share, inner",
        ),
        ('count = "3"', "a.toml, line 1: count is '3'; it must be a whole number"),
        ("count = 3.5", "a.toml, line 1: count is 3.5; it must be a whole number"),
        ("count = true", "a.toml, line 1: count is True; it must be a whole number"),
        ("flag = 1", "a.toml, line 1: flag is 1; it must be true or false"),
        ("title = 1", "a.toml, line 1: title is 1; it must be text in quotes"),
        ("place = 1", "a.toml, line 1: place is 1; it must be a path in quotes"),
        ("pair = [1]", "a.toml, line 1: pair is [1]; it must be a list of 2: a whole number, a number"),
        ("limit = 2.5", 'a.toml, line 1: limit is 2.5; it must be a whole number or "none"'),
        ("inner = 4", "a.toml, line 1: inner is 4; it must be a table: [inner]"),
        ('[inner]\nnames = "x"', "a.toml, line 2: inner.names is 'x'; it must be a list of texts"),
        ('[inner]\nsizes.a = "x"', "inner.sizes is {'a': 'x'}; it must be a table of whole numbers"),
        (
            'inner.kind = "squrae"',
            "line 1: inner.kind is 'squrae'; it must be one of 'round', 'square', 'oval'; did you mean 'square'?",
        ),
        ("flag = true\ncount = -5", "a.toml, line 2: count is -5; it must be at least 0"),
        ("count =", "a.toml: not valid TOML: Invalid value"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(Outer, tmp_path / "a.toml", text)


def test_a_missing_file_and_a_binary_one_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: no such file; `arriero ls presets`"):
        load(Outer, tmp_path / "no.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"b\.toml: cannot be read as a text file"):
        load(Outer, tmp_path / "b.toml")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"c\.json: holds a list; it must be one table"):
        load(Outer, tmp_path / "c.json")


def test_byte_order_marks_and_any_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    for text in ("\ufefftitle = 'x'\r\ncount = 5\r\n", "\ufefftitle = 'x'\rcount = 5\r", "title = 'x'\ncount = 5"):
        file.write_bytes(text.encode())
        assert load(Outer, file) == Outer(title="x", count=5)
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"count": 5}')
    assert load(Outer, tmp_path / "a.json") == Outer(count=5)
    file.write_bytes("# one\u2028two\x85three\ncuont = 5".encode())  # which end no line of TOML
    with pytest.raises(ConfigError, match="line 2: unknown key"):
        load(Outer, file)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.toml", "count = 5".encode("utf-16"), "a.toml: cannot be read as a text file: it is UTF-16; save it as"),
        ("a.toml", "count = 5".encode("utf-16-le"), "it is UTF-16; save it as UTF-8"),
        ("a.toml", b"count = 5\ntitle = 'caf\xe9'", "a.toml, line 2: cannot be read as a text file: not UTF-8; save"),
        ("a.toml", b"count = 5\ncount = 6", "a.toml: not valid TOML: a key is given twice (at end of"),
        ("a.json", b'{"count": 5, "count": 6}', "a.json: not valid JSON: the key 'count' is given twice"),
        ("a.json", b'{"inner": {"rate": 5, "rate": 5}}', "the key 'rate' is given twice"),
        ("a.toml", b"names = " + b"[" * 50_000, "a.toml: not valid TOML: tables or lists within each other without"),
        ("a.json", b'{"a": ' * 50_000, "a.json: not valid JSON: tables or lists within each other without end"),
        ("a.toml", b"count = " + b"9" * 5000, "a.toml: not valid TOML: Exceeds the limit"),
        ("a.toml", b"title = 2024-01-31", "a.toml, line 1: title is 2024-01-31; it must be text in quotes"),
        ("a.toml", b"count = 07:32:00", "count is 07:32:00; it must be a whole number"),
        ("a.toml", b"count = 2024-01-31T07:32:00Z", "count is 2024-01-31T07:32:00+00:00; it must be a whole number"),
        ("a.toml", b"count = 'x" + b"x" * 5000 + b"'", "... (5,003 characters); it must be a whole number"),
        ("a.toml", b"recipe = ['sft']", "a.toml, line 1: recipe ['sft'] is unknown"),
        ("a.toml", b"recipe = 3", "a.toml, line 1: recipe 3 is unknown"),
    ],
)  # fmt: skip
def test_what_a_file_of_settings_cannot_be_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as error:
        load_recipe({"sft": Outer}, tmp_path / name) if b"recipe" in data else load(Outer, tmp_path / name)
    assert message in str(error.value)


@dataclass(frozen=True)
class Settled:
    """Built as every configuration is."""

    rate: float = 0.5
    many: tuple[float, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    title: str = ""
    place: Path = Path("here")
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        settle(self)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate = nan", "a.toml, line 1: rate is nan; it must be a finite number"),
        ("\nmany = [1.0, -inf]", "a.toml, line 2: many is -inf; it must be a finite number"),
        ("[inner]\nrate = inf", "inner.rate is inf; it must be a finite number"),
        ("sizes = {a = 9223372036854775808}", "sizes is 9223372036854775808; a whole number has 64 bits at most"),
        ('[inner]\nsizes = {a = -99999999999999999999}', "inner.sizes is -99999999999999999999; a whole number has 64"),
    ],
)  # fmt: skip
def test_a_number_that_no_setting_can_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(Settled, tmp_path / "a.toml", text)


def test_text_that_no_file_could_hold_is_refused_and_the_largest_numbers_are_not() -> None:
    with pytest.raises(ConfigError, match=r"title is 'caf\\udce9', which is not UTF-8, so no file of settings could"):
        Settled(title="caf\udce9")
    made = Settled(rate=1e308, sizes={"a": 2**63 - 1, "b": -(2**63)}, place=Path("~/x"))
    assert made.sizes["a"] == 2**63 - 1 and made.place == Path("~/x").expanduser()


CONFIGS = (
    SftConfig,
    PretrainConfig,
    GenerateConfig,
    ChatConfig,
    EvalConfig,
    NeedleConfig,
    PassConfig,
    SweepConfig,
    CurateConfig,
)


@pytest.mark.parametrize("cls", CONFIGS)
def test_no_configuration_takes_a_number_that_is_not_finite(cls: type) -> None:
    def numbers(of: object, prefix: str = "") -> Iterator[tuple[str, object]]:
        for name in (f.name for f in fields(of)):  # type: ignore[arg-type]
            value = getattr(of, name)
            if is_dataclass(value):
                yield from numbers(value, f"{prefix}{name}.")
            elif isinstance(value, float) or (isinstance(value, tuple) and value and isinstance(value[0], float)):
                yield prefix + name, value

    for name, value in numbers(cls()):
        for bad in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(ConfigError, match=name.rpartition(".")[2]):
                apply_overrides(cls(), {name: (bad, *value[1:]) if isinstance(value, tuple) else bad})


def test_a_key_without_default_has_to_be_given() -> None:
    @dataclass(frozen=True)
    class Needy:
        size: int

    with pytest.raises(ConfigError, match=r"^config: the key 'size' is missing; it must be a whole number$"):
        from_dict(Needy, {})


def test_the_recipe_key_chooses_the_class(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(to_toml(Outer(count=5), recipe="big"))
    assert load_recipe({"small": Inner, "big": Outer}, file) == ("big", Outer(count=5))
    assert load(Outer, file) == Outer(count=5)
    with pytest.raises(ConfigError, match=r"a\.toml, line 1: recipe 'big' is unknown; did you mean 'bug'\?"):
        load_recipe({"bug": Inner}, file)
    file.write_text("count = 5")
    with pytest.raises(ConfigError, match=r'the key "recipe" is missing; begin the file with: recipe = "big"'):
        load_recipe({"big": Outer}, file)


def test_overrides_are_found_by_dotted_or_by_short_name_and_read_as_their_type() -> None:
    changed = apply_overrides(
        Outer(),
        {
            "count": "7",
            "flag": "true",
            "inner.rate": "3e-4",
            "names": "a, b",
            "kind": "oval",
            "limit": "11",
            "pair": "2,3",
        },
    )
    expected = Outer(count=7, flag=True, limit=11, pair=(2, 3.0), inner=Inner(rate=3e-4, names=("a", "b"), kind="oval"))
    assert changed == expected
    assert apply_overrides(changed, {"limit": "none", "names": "", "sizes": '{"a.b" = 3}', "share": "0.25"}) == Outer(
        count=7, flag=True, limit=None, pair=(2, 3.0), share=0.25, inner=Inner(3e-4, (), {"a.b": 3}, "oval")
    )
    assert apply_overrides(Outer(), {"rate": 2, "names": ["x"], "limit": 5}) == Outer(limit=5, inner=Inner(2.0, ("x",)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cuont", "3", "unknown setting 'cuont'; did you mean 'count'?"),
        ("inner.rat", "3", "unknown setting 'inner.rat'; did you mean 'inner.rate'"),
        ("count", "three", "count is 'three'; it must be a whole number"),
        ("flag", "yes", "flag is 'yes'; it must be true or false"),
        ("rate", "fast", "inner.rate is 'fast'; it must be a number"),
        ("rate", True, "inner.rate is True; it must be a number"),
        ("pair", "1", "pair is '1'; it must be a list of 2"),
        ("pair", "1,x", "pair is (1, 'x'); it must be a list of 2"),
        ("sizes", "a", "inner.sizes is 'a'; it must be a table of whole numbers"),
        ("count", "-3", "count is -3; it must be at least 0"),
    ],
)
def test_a_bad_override_is_refused_with_its_remedy(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(Outer(), {name: value})
    assert str(error.value).startswith(message)


def test_a_short_name_of_two_settings_is_refused() -> None:
    @dataclass(frozen=True)
    class Two:
        left: Inner = field(default_factory=Inner)
        right: Inner = field(default_factory=Inner)

    with pytest.raises(
        ConfigError, match=r"'rate' is the name of several settings; write one of left\.rate, right\.rate"
    ):
        apply_overrides(Two(), {"rate": 1})
    assert apply_overrides(Two(), {"right.rate": 1}) == Two(right=Inner(rate=1.0))


def test_changes_that_only_fit_together_are_made_together() -> None:
    base = SftConfig()
    with pytest.raises(ConfigError, match="batch_rows 12 is not a multiple of micro_rows 8"):
        apply_overrides(apply_overrides(base, {"micro_rows": "8"}), {"batch_rows": "12"})
    loop = apply_overrides(base, {"batch-rows": "12", "micro-rows": "6"}).loop
    assert (loop.batch_rows, loop.micro_rows) == (12, 6)


def test_the_fine_tuning_settings_have_documentation_and_unambiguous_short_names() -> None:
    def classes(cls: type) -> list[type]:
        defaults = cls()
        inner = [type(getattr(defaults, f.name)) for f in fields(cls) if is_dataclass(getattr(defaults, f.name))]
        return [cls, *inner]

    for cls in classes(SftConfig):
        for name in (f.name for f in fields(cls)):
            is_table = is_dataclass(getattr(cls(), name))
            assert is_table or field_docs(cls).get(name), f"{cls.__name__}.{name} has no string under it"
    short = [path.rpartition(".")[2] for path in field_paths(SftConfig)]
    assert len(short) == len(set(short))


@dataclass(frozen=True)
class Part:
    """A part."""

    start: float = 0.5
    """When."""
    sizes: dict[str, int] = field(default_factory=dict)
    """How much."""

    def __post_init__(self) -> None:
        if self.start > 1:
            raise ConfigError(f"start is {self.start}; it must be at most 1")


@dataclass(frozen=True)
class Divided:
    """Has parts."""

    name: str = "x"
    """Its name."""
    parts: tuple[Part, ...] = ()
    """What it is made of."""


def test_a_list_of_tables_is_written_and_read_back(tmp_path: Path) -> None:
    config = Divided(parts=(Part(0.25, {"a": 3}), Part(0.75)))
    file = tmp_path / "divided.toml"
    for each in (config, Divided()):
        file.write_text(to_toml(each))
        assert load(Divided, file) == each
        assert from_dict(Divided, to_dict(each)) == each
    file.write_text("[[parts]]\nstart = 0.5\n[[parts]]\nstart = 2.0\n")
    with pytest.raises(ConfigError, match=r"start is 2\.0; it must be at most 1"):
        load(Divided, file)
    file.write_text("[[parts]]\nbegin = 0.5\n")
    with pytest.raises(ConfigError, match=r"unknown key 'parts\.begin'"):
        load(Divided, file)
