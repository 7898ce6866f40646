"""Text that others wrote is printed as text: no markup, no control of the terminal, in any encoding, on any streams."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from arriero import cli
from arriero.errors import UserError
from arriero.eval.bootstrap import mean
from arriero.eval.needle_run import NeedleResults, needle_png, needle_table
from arriero.eval.results import Results, Sample, examples_table, measures_table
from arriero.show import terminal
from arriero.show.terminal import check_input, clean, label, say
from arriero.tokenizer import load_tokenizer

MARKUP = ["[/INST]", "[/b]", "[link=http://x]y[/link]", "[bold red]", "[/]", "[[", "\\[x]", ":smile:", "[@click=x]"]
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202egpj.exe\u2066\x00\x7f"
SHOWN = "\\x1b[2J\\x1b]0;owned\\x07\\r\\x9b31m\\u202egpj.exe\\u2066\\x00\\x7f"


def safe(**settings: Any) -> Console:
    made: Console = terminal._console()(file=io.StringIO(), width=400, **settings)
    return made


def printed(what: Any, **settings: Any) -> str:
    console = safe(**settings)
    console.print(what)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_control_characters_and_turns_of_direction_are_shown_as_escapes() -> None:
    assert clean(HOSTILE) == SHOWN
    assert clean("a\tb\nc\r\nd é 你 🦙 \u200f") == "a\tb\nc\nd é 你 🦙 \u200f"
    assert clean("你é█", "ascii") == "\\u4f60\\xe9#"
    assert clean("你é", "cp1252") == "\\u4f60é"
    assert clean("caf\udce9") == "caf\\udce9"


@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_a_cell_a_title_a_text_and_a_task_is_printed_as_it_is(text: str) -> None:
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    assert printed(table).count(text) == 4
    assert printed(text) == printed(Text(text)) == text + "\n"
    console = safe(force_terminal=True, color_system=None)
    with Progress(label(), console=console) as bar:
        bar.add_task(text, total=1)
    assert text in console.file.getvalue()  # type: ignore[attr-defined]
    console = safe()
    console.rule(text)
    assert text in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_table_of_hostile_text_keeps_its_columns() -> None:
    table = Table()
    for name in ("a", "b"):
        table.add_column(name)
    table.add_row(HOSTILE, "x")
    lines = printed(table).splitlines()
    assert SHOWN in lines[3] and len({len(line) for line in lines}) == 1


def results(name: str, text: str) -> Results:
    samples = [Sample(text, text, text, {"exact": 1.0}) for _ in range(3)]
    return Results(name, {"exact": mean([1.0, 0.0, 1.0])}, samples, 3, 1.0)


@pytest.mark.parametrize("text", [*MARKUP, HOSTILE])
@pytest.mark.parametrize("of_user", [False, True], ids=["our console", "a user's console"])
def test_names_and_answers_of_any_kind_stand_in_the_tables_of_an_evaluation(text: str, of_user: bool) -> None:
    before, after = results(text, text), results(f"{text}2", text)
    console = Console(file=io.StringIO(), width=400, emoji=False) if of_user else safe()
    for table in (
        measures_table(None, after, 100, 0), measures_table(before, after, 100, 0),
        examples_table(after, None, 2), examples_table(before, after, 2),
    ):  # fmt: skip
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    if text in MARKUP:
        assert shown.count(text) >= 3 + 2 * 3 + 2 * 4
    assert "\x1b" not in shown or of_user


@pytest.mark.parametrize("name", ["$x", "$\\frac{$", "a_b^{c", "\\alpha", "你好 🦙", "x\ny\x1b"])
def test_a_picture_has_a_title_of_any_name(name: str) -> None:
    figure = needle_png([needle(name)])
    assert figure.startswith(b"\x89PNG")
    assert name.replace("\x1b", "\\x1b").splitlines()[0] in printed(needle_table(needle(name)))


def needle(name: str) -> NeedleResults:
    from types import SimpleNamespace

    findings: list[Any] = [
        SimpleNamespace(length=64, depth=depth, found=True, chosen=True, bits=1.0) for depth in (0.0, 1.0)
    ]
    return NeedleResults(name, {}, [], 2, 1.0, findings, {64: 1.0}, 2048)


def test_what_is_said_is_clean_on_a_terminal_and_as_it_is_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(HOSTILE, end="")
    assert capsys.readouterr().out == HOSTILE
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say(HOSTILE)
    assert capsys.readouterr().out == SHOWN + "\n"


def test_an_error_about_a_hostile_name_cannot_rewrite_the_screen(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "m", "--data", "\x1b[2J\u202e[/b].txt"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[2J\\u202e[/b].txt: no such file" in said and "\x1b" not in said


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, with a chat template and a special token that looks like markup."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "[/INST]", "[INST]"]
    bpe.train_from_iterator([], tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    directory = tmp_path_factory.mktemp("toy")
    bpe.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
        "{% else %}{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    )
    config = {"eos_token": "<|endoftext|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp932", "utf-8"])
def test_an_output_of_any_encoding_takes_tokens_rows_errors_and_results(
    encoding: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "né 日 🦙 [/INST] █⟦"
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    ids = " ".join(map(str, load_tokenizer(toy).encode(text)))
    for words in (
        ["tokenizer", "encode", str(toy), "--show", text],
        ["tokenizer", "encode", str(toy), "--decode", ids],
        ["data", "inspect", str(tmp_path / "rows.jsonl"), "--model", str(toy), "--workers", "1"],
        ["ls", "presets"],
    ):
        assert cli.main(words) == 0, words
    assert cli.main(["tokenizer", "encode", f"{tmp_path}/日.json", "x"]) == 2
    out.flush()
    err.flush()
    shown = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    said = err.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "[/INST]" in shown and ("日" in shown) == (encoding in ("cp932", "utf-8"))
    assert ("日.json" if encoding in ("cp932", "utf-8") else "\\u65e5.json") in said


CLOSED = {
    "stdout": (["ls", "models"], ">&-", 0),
    "stdin": (["tokenizer", "encode", "TOY", "--count"], "<&-", 0),
    "stderr": (["ls", "nix"], "2>&-", 2),
    "all": (["tokenizer", "encode", "TOY", "--show", "x"], "<&- >&- 2>&-", 0),
    "full": (["ls", "models"], ">/dev/full", 2),
}


@pytest.mark.parametrize("which", CLOSED)
def test_streams_that_are_closed_or_full_end_nothing_with_a_traceback(which: str, toy: Path, tmp_path: Path) -> None:
    words, how, code = CLOSED[which]
    line = " ".join([sys.executable, "-m", "arriero", *(str(toy) if word == "TOY" else word for word in words)])
    done = subprocess.run(["bash", "-c", f"{line} {how}"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (code, False, False), (
        done.stderr
    )
    if which == "full":
        assert done.stderr == "arriero: No space left on device; free disk space, or write elsewhere\n"


def test_input_is_utf8_with_or_without_a_byte_order_mark_and_else_refused() -> None:
    script = (
        "import sys; from arriero.show.terminal import check_input, prepare_streams; prepare_streams()\n"
        "print(ascii(check_input(sys.stdin.read())))"
    )

    def read(data: bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-c", script], input=data, capture_output=True, env=os.environ | environment
        )

    for environment in ({}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        assert read("né 你\r\n".encode("utf-8-sig"), **environment).stdout == b"'n\\xe9 \\u4f60\\r\\n'\n"
    assert b"standard input: not UTF-8 at line 2 (byte 0xE9); convert it" in read(b"a\ncaf\xe9 \xff").stderr
    with pytest.raises(UserError, match="iconv -f latin1 -t utf-8"):
        check_input("caf\udce9")
