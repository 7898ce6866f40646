"""The command line under a user who gives every command what it cannot use: code 2, one message, no traceback.

Every command has its line in LINES; what stands there in capitals is replaced by each wrong thing of its kind in turn.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from arriero import cli

LINES = {
    "curate": "SOURCE --out OUT --workers 1",
    "curate classifier": "SOURCE --against prose.txt --out out",
    "shard": "SOURCE --tokenizer MODEL --out OUT --workers 1",
    "pretrain": "1m --data SHARDS --out out --tokens 1000",
    "sft": "MODEL --data SOURCE --out out --steps 1",
    "rejection": "MODEL --data SOURCE --out out",
    "distill": "MODEL --teacher MODEL --data SOURCE --out out --steps 1",
    "distill on-policy": "MODEL --teacher MODEL --data SOURCE --out out --steps 1",
    "dpo": "MODEL --data SOURCE --out out --steps 1",
    "reward audit": "exact --data SOURCE",
    "grpo": "MODEL --data SOURCE --out out --steps 1",
    "ppo": "MODEL --data SOURCE --out out --steps 1",
    "reward": "MODEL --data SOURCE --out out --steps 1",
    "run": "SETTINGS",
    "validate": "SETTINGS",
    "plan": "SETTINGS",
    "plan reward": "MODEL --data SOURCE",
    "dpo online": "MODEL --data SOURCE --out out --steps 1",
    "plan dpo online": "MODEL --data SOURCE",
    "plan dpo": "MODEL --data SOURCE",
    "plan grpo": "MODEL --data SOURCE",
    "plan ppo": "MODEL --data SOURCE",
    "chat": "MODEL --adapter SHARDS",
    "generate": "MODEL hi --adapter SHARDS",
    "eval": "MODEL --data SOURCE",
    "eval needle": "MODEL",
    "eval pass-at-k": "MODEL --data SOURCE",
    "eval obedience": "MODEL --data SOURCE",
    "merge": "MODEL SHARDS out",
    "average": "MODEL SHARDS --out out",
    "convert": "MODEL OUT --to gguf",
    "bench infer": "MODEL",
    "quantize": "MODEL OUT",
    "export": "MODEL OUT --to vllm --no-prove",
    "serve": "MODEL --port 0",
    "bench serve": "--url http://127.0.0.1:9",
    "data inspect": "SOURCE --model MODEL",
    "data verify": "SHARDS",
    "data build docstrings": "out --source SOURCE",
    "data why": "SOURCE 3",
    "data build preferences": "SHARDS out.jsonl",
    "data build gatt": "MODEL SOURCE out.jsonl",
    "data build distill": "MODEL SOURCE out.jsonl --preprompt x",
    "data build scored": "MODEL SOURCE out.jsonl",
    "data build tasks": "chain-sum OUT --train 3 --held-out 2",
    "tokenizer train": "SOURCE --out OUT --vocab-size 300 --n-special 11",
    "tokenizer encode": "MODEL --file MISSING",
    "tokenizer compare": "MODEL --data SOURCE",
    "tokenizer extend": "MODEL SOURCE --add 3 --out OUT",
    "scaling sweep": "--data SHARDS --budgets 1e9 --out out",
    "scaling fit": "SHARDS",
    "scaling plan": "SHARDS --flops 1e20",
    "ls": "WORD",
    "cp": "WORD out.toml",
}
RIGHT = {"SOURCE": "prose.txt", "MODEL": "smollm2-135m", "OUT": "out", "WORD": "models", "SHARDS": "folder"}
WRONG = {
    "SOURCE": ["missing.jsonl", "empty.jsonl", "empty.txt", "binary.jsonl", "binary.bin", "folder", "numbers.jsonl"],
    "SHARDS": ["missing", "empty.jsonl", "binary.bin", "folder"],
    "MODEL": ["smolm2-135m", "folder", "binary.gguf", "empty.gguf", "binary.bin", "broken"],
    "SETTINGS": ["missing.toml", "empty.toml", "binary.toml", "folder.toml", "broken.toml"],
    "OUT": ["prose.txt/out", "/proc/missing/out"],
    "MISSING": ["missing.txt", "folder"],
    "WORD": ["nonsense"],
}
CASES = [
    pytest.param(name, slot, wrong, marks=[pytest.mark.slow] * (wrong != WRONG[slot][0]))  # together two minutes
    for name, line in LINES.items()
    for slot in WRONG
    if slot in line.split()
    for wrong in WRONG[slot]
    if (name, wrong) != ("curate", "empty.txt")  # a document without text, which its steps drop
]

OTHERWISE = "must be a file|no sources; give|no model is given; name|nothing that speaks OpenAI's API"


@pytest.fixture(scope="module")
def mess(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of things that no command can use, and one text."""
    root = tmp_path_factory.mktemp("mess")
    binary = bytes((37 * i + 11) % 256 for i in range(3001))
    for name in ("jsonl", "txt", "toml", "gguf"):
        (root / f"empty.{name}").touch()
    for name in ("jsonl", "bin", "toml", "gguf"):
        (root / f"binary.{name}").write_bytes(binary)
    for name in ("folder", "folder.toml", "broken"):
        (root / name).mkdir()
    (root / "broken" / "config.json").write_text("{no json")
    (root / "broken.toml").write_text('recipe = "sft"\nmodel = 3\n')
    (root / "numbers.jsonl").write_text("1\n2\n3\n")
    (root / "prose.txt").write_text(" ".join(f"Llama {i % 11} hums to quokka {i % 13}." for i in range(997)))
    return root


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """The exit code of a command line, and what it wrote to standard error."""
    try:
        code = cli.main(args)
    except SystemExit as exit_:  # tyro's way
        code = int(exit_.code or 0)
    return code, capsys.readouterr().err


def test_no_command_escapes() -> None:
    assert LINES.keys() == cli.COMMANDS.keys()
    assert {word for line in LINES.values() for word in re.findall("[A-Z]{3,}", line)} == WRONG.keys()


@pytest.mark.parametrize("name", LINES)
def test_a_misspelt_flag_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str], mess: Path) -> None:
    if LINES[name] == "SETTINGS":
        pytest.skip("its flags are those of the file: tests/test_cli.py")
    words = [RIGHT.get(word, word) for word in LINES[name].split()]
    code, text = said(capsys, *name.split(), *words, "--forx")
    assert code == 2 and "Unrecognized options: --forx" in text


@pytest.mark.parametrize("name", LINES)
def test_a_command_without_arguments_says_what_is_missing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, *name.split())
    assert code == 2
    assert re.search(f"Missing from arriero {name}|{OTHERWISE}", text)


@pytest.mark.parametrize(("name", "slot", "wrong"), CASES)
def test_what_cannot_be_used_is_named(
    name: str,
    slot: str,
    wrong: str,
    capsys: pytest.CaptureFixture[str],
    mess: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(mess, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    words = [wrong if word == slot else RIGHT.get(word, word) for word in LINES[name].split()]
    code, text = said(capsys, *name.split(), *words)
    assert code == 2, text
    message = " ".join(re.sub(r"[╭╮╰╯│─]", " ", text).split())
    assert Path(wrong).name.partition(".")[0] in message or Path(wrong).parent.name in message, message
    assert len(message) < 1000, message


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free disk space, or write elsewhere"),
        (errno.EACCES, "change its permissions, or give another path"),
        (errno.EROFS, "change its permissions, or give another path"),
        (errno.ENOTDIR, "a part of the path is a file; give another path"),
        (errno.ENAMETOOLONG, "a file system takes 255 bytes in a name; give a shorter one"),
        (errno.EMFILE, "let the process have more of them (ulimit -n 65536), or give fewer --workers"),
        (errno.EIO, "the disk, or the server that it is on, fails: copy the file elsewhere, or fetch it again"),
        (errno.EBUSY, "check the path"),
    ],
)
def test_what_the_system_refuses_is_told_with_a_remedy(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number), "a/file")

    monkeypatch.setitem(cli.COMMANDS, "cp", refuse)
    assert said(capsys, "cp") == (2, f"arriero: a/file: {os.strerror(number)}; {remedy}\n")


def test_a_system_error_about_no_file_is_ours_unless_the_disk_is_full(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setitem(cli.COMMANDS, "cp", lambda: refuse(errno.ENOSPC))
    assert said(capsys, "cp") == (2, "arriero: No space left on device; free disk space, or write elsewhere\n")
    monkeypatch.setitem(cli.COMMANDS, "cp", lambda: refuse(errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):
        cli.main(["cp"])
