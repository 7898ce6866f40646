"""Paths as users write them: a tilde is the home wherever a path is given, and a name of something built in gives way
to a path of that name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from helpers.shards import write_shards

import arriero
from arriero import cli, presets, settings
from arriero.checkpoint.source import resolve
from arriero.cli import parsing, train
from arriero.curate.config import CurateConfig
from arriero.curate.sources import list_files
from arriero.errors import ConfigError, DataError, UserError
from arriero.eval.config import EvalConfig, NeedleConfig
from arriero.infer.config import ChatConfig, GenerateConfig
from arriero.io.files import make_output
from arriero.io.paths import PathText, as_path, expand, hint
from arriero.model.catalogue import SHAPES, named_shape
from arriero.show.terminal import warn_once
from arriero.train.config import PretrainConfig, SftConfig
from arriero.train.scaling.budget import open_law
from arriero.train.scaling.config import SweepConfig

CONFIGS = (SftConfig, PretrainConfig, GenerateConfig, ChatConfig, EvalConfig, NeedleConfig, SweepConfig, CurateConfig)
PATH_FIELDS = {  # of all configurations; a new one that names a file has to be PathText, and enters here
    "model", "out", "data.train", "data.validation", "adapter", "compare_with", "data", "haystack", "sources",
    "quality.model", "decontaminate.against", "chat_template", "json_schema", "grammar",
}  # fmt: skip


OTHER_TEXTS = {
    "lora.targets", "lora.rank_pattern", "lora.alpha_pattern", "prompts", "data.weights", "data.max_epochs", "prompt",
    "system", "steps", "text_key", "code_sources", "ray", "language.keep", "gopher_quality.stop_words", "c4.line_ends",
    "dirty_words.words", "licence.keep", "scrub.email", "scrub.ip", "regex", "choices",
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and an empty directory to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def leaves(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all settings with their types, marks included."""
    hints = get_type_hints(cls, include_extras=True)
    for name in (f.name for f in fields(cls)):
        if is_dataclass(hints[name]):
            yield from leaves(hints[name], f"{prefix}{name}.")
        else:
            yield prefix + name, hints[name]


def test_a_tilde_is_the_home_and_a_users_name_its_home(home: Path) -> None:
    assert expand("~") == str(home)
    assert expand("~/a/~/b c\n") == f"{home}/a/~/b c\n"
    assert expand("~root/x") == os.path.expanduser("~root/x") != "~root/x"
    for other in ("a~", "./~", "a/~/b", "$HOME/x", "smollm2-135m", "0.05", ""):
        assert expand(other) == other
    with pytest.raises(ConfigError, match=r"~nobody-here/x: there is no home of a user 'nobody-here'; write \./"):
        expand("~nobody-here/x")
    Path("~backup.txt").touch()
    assert expand("~backup.txt") == "~backup.txt"
    with pytest.raises(ConfigError, match="no path has a NUL character"):
        expand("a\0b")
    with pytest.raises(ConfigError, match="a path is empty"):
        as_path("")


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_path_of_a_configuration_is_expanded_from_a_file_from_flags_and_in_python(cls: Any, home: Path) -> None:
    marked = {name for name, kind in leaves(cls) if kind is PathText or PathText in get_args(kind)}
    assert marked == {name for name, _ in leaves(cls)} & PATH_FIELDS
    texts = {name for name, kind in leaves(cls) if kind is str or (kind is not PathText and str in get_args(kind))}
    assert texts <= OTHER_TEXTS, "is it a path (PathText), or other text?"
    for name, kind in leaves(cls):
        if name in marked:  # one at a time, since some exclude each other
            is_read_everywhere(cls, name, "~/x" if kind is PathText else ("~/x", "y"), home)


def is_read_everywhere(cls: Any, name: str, value: Any, home: Path) -> None:
    expected = f"{home}/x" if isinstance(value, str) else (f"{home}/x", "y")
    built = settings.apply_overrides(cls(), {name: value})
    Path("a.toml").write_text(settings.to_toml(built).replace(f"{home}/", "~/"))
    assert '"~/x"' in Path("a.toml").read_text()
    for made in (built, settings.load(cls, "a.toml"), settings.from_dict(cls, settings.to_dict(built)), replace(built)):
        found: Any = made
        for part in name.split("."):
            found = getattr(found, part)
        assert found == expected, name


# Parameters of commands that are other text.
NO_PATHS = {"text", "text_key", "set", "ray", "device", "steps", "recipe", "reward", "task", "preprompt"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_text_parameter_of_a_command_is_a_path_or_known_to_be_none(name: str) -> None:
    for parameter, kind in get_type_hints(cli.COMMANDS[name], include_extras=True).items():
        alternatives = [kind] if kind is PathText else [kind, *get_args(kind)]
        if str in alternatives and get_origin(kind) is not Literal and (name, parameter) != ("cp", "preset"):
            assert parameter in NO_PATHS, f"{name}: {parameter} is text; is it a path (PathText)?"


def test_flags_with_an_equals_sign_and_positional_paths_are_expanded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["cp", "pretrain-1m", "~/mine.toml"]) == 0
    started: list[Any] = []
    monkeypatch.setattr(train, "start", lambda _, made: started.append(made))
    assert cli.main(["pretrain", "~/mine.toml", "--data=~/shards", "--out=~/run", "--validation", "~/held"]) == 0
    assert cli.main(["pretrain", "~/model", "--data", "~/shards"]) == 0
    assert [c.model for c in started] == ["1m", f"{home}/model"]
    assert (started[0].out, started[0].data.train, started[0].data.validation) == (
        f"{home}/run", f"{home}/shards", f"{home}/held"
    )  # fmt: skip
    (home / "few.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    words = ["~/few.jsonl", "--out=~/corpus", "--steps", "normalise", "--workers", "1"]
    assert cli.main(["curate", *words, "--set", "decontaminate.against=~/few.jsonl,~/more.jsonl"]) == 2
    assert cli.main(["curate", *words]) == 0
    assert (home / "corpus" / "manifest.json").is_file()
    assert not any(path.name.startswith("~") for path in Path.cwd().iterdir())


def test_python_callers_need_no_expanding_either(home: Path) -> None:
    from arriero.data.shards import Shards, find_sets

    write_shards(home / "set", [5, 7])
    assert Shards("~/set").n_documents == len(find_sets("~/set")[0]) == 2
    (home / "a.txt").write_text("x")
    assert list_files(["~/a.txt"])[0].path == home / "a.txt"
    with pytest.raises(UserError, match=f"{home}/nix"):
        arriero.load("~/nix/model")
    with pytest.raises(UserError, match=f"{home}/nix"):
        arriero.load_tokenizer("~/nix")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("cp pretrain-1m |", "file is empty; name a file or a directory"),
        ("shard a.txt --tokenizer t --out=", "out is empty; name a file or a directory"),
        ("shard a.txt --tokenizer | --out o", "tokenizer is empty; name a file or a directory"),
        ("chat |", "a path is empty; give a name"),
        ("pretrain 1m --data x --out=", "out is empty; name a directory for the run"),
        ("pretrain 1m --data x --out 1m", "out and model are both '1m', and a directory of that name is taken for"),
        ("pretrain 1m --data x --out ./1m/", "out and model are both '1m'"),
    ],
)
def test_an_empty_path_is_no_directory(args: str, said: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["" if word == "|" else word for word in args.split()]) == 2
    assert said in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_a_path_that_is_not_there_is_told_with_names_like_it_or_where_its_link_leads(home: Path) -> None:
    Path("shards").mkdir()
    Path("broken").symlink_to("nowhere/at all")
    assert hint("shrads") == "; did you mean 'shards'?"
    assert hint("broken") == " (it is a link to 'nowhere/at all', which is not there)"
    assert hint("$DATA/shards") == " (environment variables are not expanded)"
    assert hint("shards") == ""  # it is there, and of another kind than was asked for
    assert hint("no/such/directory") == hint("qqqq") == ""
    with pytest.raises(DataError, match=r"shrads\.jsonl: no such file or directory; .*did you mean 'shards'\?"):
        list_files(["shrads.jsonl"])
    with pytest.raises(
        UserError, match=r"no model 'broken': .* \(it is a link to 'nowhere/at all', which is not there"
    ):
        resolve("broken")
    with pytest.raises(
        ConfigError, match=r"broken: nothing can be written there \(File exists \(it is a link to 'nowhere"
    ):
        make_output(Path("broken"))


def test_a_directory_below_that_cannot_be_read_is_named_and_not_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("data/open", "data/closed"):
        write_shards(Path(folder), [5, 7])
        (Path(folder) / "rows.jsonl").write_text("{}\n")
    scan = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    for words in (["data", "verify", "data"], ["eval", "m", "--data", "data"]):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert "data/closed: Permission denied; change its permissions, or give another path" in said, words


def test_a_directory_of_a_built_in_name_is_the_directory_and_that_is_said_once(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    assert presets.is_settings("pretrain-10m") and named_shape("30m") is SHAPES["30m"]
    for name in ("smollm2-135m", "pretrain-10m", "30m", "stdlib", "owner/name", "llama3"):
        Path(name).mkdir(parents=True)
    (Path("stdlib") / "a.py").write_text("x = 1")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert resolve("smollm2-135m") == Path("smollm2-135m")
            assert resolve("owner/name") == Path("owner/name")
            assert not presets.is_settings("pretrain-10m") and named_shape("30m") is None
            assert [file.path for file in list_files(["stdlib"])] == [Path("stdlib/a.py")]
    assert [record.message for record in caplog.records] == [
        f"{name} is the directory of that name here, not {what}; work elsewhere, or rename it, to get that"
        for name, what in (
            ("smollm2-135m", "the built-in model"),
            ("pretrain-10m", "the preset"),
            ("30m", "the shape"),
            ("stdlib", "Python's standard library"),
        )
    ]
    assert presets.load("pretrain-10m") == presets.get("pretrain-10m")  # a directory can be no settings
    assert open_law("llama3").name == "llama3"  # and one without fit.json no law
    Path("pretrain-1m").write_text(settings.to_toml(presets.get("lora-8b")[1], "sft"))
    assert presets.load("pretrain-1m") == presets.get("lora-8b")


def test_plan_refuses_data_that_are_not_there_and_plans_a_preset_without_its_own(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("shards").mkdir()
    assert cli.main(["plan", "pretrain-10m"]) == 0
    assert f"{SHAPES['10m'].n_params:,}" in capsys.readouterr().out
    for missing in ("shrads", "out/shards"):
        assert cli.main(["plan", "pretrain-10m", "--data", missing]) == 2
        said = capsys.readouterr().err
        assert f"{missing}: no such directory of token shards, which `arriero shard` makes; with --data ''" in said
        assert ("did you mean 'shards'?" in said) == (missing == "shrads")
    assert cli.main(["cp", "pretrain-10m", "mine.toml"]) == 0
    assert cli.main(["plan", "mine.toml"]) == 2
    assert "out/shards: no such directory" in capsys.readouterr().err
    assert cli.main(["plan", "mine.toml", "--data", ""]) == 0


def test_what_would_be_misread_in_silence_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for word, said in (
        ("–data", "–data: begins with a typographic dash (U+2013); type --data, or, where it is no flag, put --"),
        ("—lr=3", "—lr=3: begins with a typographic dash (U+2014); type --lr=3"),
        ("−−lr", "−−lr: begins with a typographic dash (U+2212); type --lr"),
    ):
        assert cli.main(["pretrain", "1m", word, "x"]) == 2
        assert said in capsys.readouterr().err
    for words in (["--lr", "1", "--lr", "2"], ["--lr=1", "--optim.lr", "2"], ["--resume", "--no-resume"]):
        assert cli.main(["pretrain", "1m", "--data", "x", *words]) == 2
        assert "is given twice, and one alone would count; give it once" in capsys.readouterr().err
    parsing._refuse_misread(["generate", "m", "– a list", "--", "–raw", "--lr", "--lr"])


def test_numbers_below_zero_and_flags_with_an_equals_sign_are_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(train, "start", lambda _, made: started.append(made))
    assert cli.main(["pretrain", "1m", "--data=a=b", "--dp-shard", "-1", "--lr=3e-4"]) == 0
    assert (started[0].data.train, started[0].parallel.dp_shard, started[0].optim.lr) == ("a=b", -1, 3e-4)
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "1m", "--data", "x", "--seed", "-1"])
    assert "seed is -1; it must be a whole number" in " ".join(capsys.readouterr().err.split())
