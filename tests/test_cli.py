"""The command line as users meet it: help, examples, exit codes, and what it says to a mistake."""

# ruff: noqa: E501 -- tables of messages read better on one line
from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from arriero import cli, presets
from arriero.cli import recipes, train
from arriero.model.catalogue import SHAPES
from arriero.settings import load_recipe

COMMANDS = list(cli.COMMANDS)


def arriero(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "arriero", *args], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What standard error says to a command line that must end with code 2 and no traceback."""
    try:
        code = cli.main(args)
    except SystemExit as exit_:  # tyro's way
        code = exit_.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", said).split())


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from arriero.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pyarrow', 'matplotlib', 'rich', 'tyro', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", done.stdout, re.M), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example_and_no_torch(name: str) -> None:
    script = f"import sys; from arriero.cli import main\ntry: main({[*name.split(), '--help']!r})\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: arriero {name} " in done.stdout
    assert f"    arriero {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_every_command_parse(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cp", "lora-8b", "mine.toml"]) == 0
    examples = re.findall(rf"^ +(arriero {name} .*)$", cli.COMMANDS[name].__doc__ or "", re.M)
    assert examples
    calls: list[tuple[object, ...]] = []
    original = cli.COMMANDS[name]

    def record(*args: object, **kwargs: object) -> None:
        calls.append((*args, *kwargs.values()))

    record.__doc__, record.__annotations__ = original.__doc__, original.__annotations__
    record.__wrapped__ = original  # type: ignore[attr-defined]
    monkeypatch.setitem(cli.COMMANDS, name, record)
    for example in examples:
        assert cli.main(shlex.split(example.partition(" < ")[0])[1:]) == 0, example
    assert len(calls) == len(examples)


def test_ls_models_gives_the_published_parameter_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "models"]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows.keys() == SHAPES.keys()
    assert rows["llama2-70b"] == "68,976,648,192"
    assert rows["llama3.1-405b"] == "405,853,388,800"
    assert rows["smollm2-135m"] == "134,515,008"


def test_cp_writes_every_preset_as_a_file_that_run_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in presets.PRESETS:
        file = tmp_path / f"{name}.toml"
        assert cli.main(["cp", name, str(file)]) == 0
        assert load_recipe(presets.RECIPES, file) == presets.get(name)
    said = refused(capsys, "cp", "lora-8b", str(tmp_path / "lora-8b.toml"))
    assert said.endswith("lora-8b.toml exists; choose another name, or add --force to overwrite it")
    assert cli.main(["cp", "full-8b", str(tmp_path / "lora-8b.toml"), "--force"]) == 0
    assert load_recipe(presets.RECIPES, tmp_path / "lora-8b.toml") == presets.get("full-8b")
    assert "does not exist; make it first" in refused(capsys, "cp", "lora-8b", str(tmp_path / "no" / "a.toml"))


def test_plan_needs_no_weights_for_a_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "llama3.1-8b", "--rank", "8"]) == 0
    said = capsys.readouterr().out
    assert "8,030,261,248" in said
    assert "20,971,520" in said  # 8 x 32 layers x the widths of seven linears, 81,920


def test_run_takes_the_file_and_lets_flags_change_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(recipes, "start", lambda recipe, config: started.append((recipe, config)))
    file = tmp_path / "a.toml"
    assert cli.main(["cp", "lora-8b", str(file)]) == 0
    flags = ["--lr", "7e-5", "--loop.steps", "11", "--no-packing", "--data", "x.csv", "--targets", "q_proj", "k_proj"]
    assert cli.main(["run", str(file), *flags]) == 0
    recipe, config = started.pop()
    assert recipe == "sft"
    assert (config.optim.lr, config.loop.steps, config.data.packing, config.data.train) == (7e-5, 11, False, "x.csv")
    assert config.lora.targets == ("q_proj", "k_proj")
    assert (config.lora.rank, config.model) == (8, "meta-llama/Llama-3.1-8B-Instruct")


def test_a_preset_or_a_file_may_stand_in_the_models_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(train, "start", lambda recipe, config: started.append((recipe, config)))
    file = tmp_path / "a.toml"
    assert cli.main(["cp", "pretrain-10m", str(file)]) == 0
    for name in ("pretrain-10m", str(file)):
        assert cli.main(["pretrain", name, "--data", "x", "--tokens", "2e6"]) == 0
        recipe, config = started.pop()
        assert recipe == "pretrain" and (config.model, config.data.train, config.tokens) == ("10m", "x", 2e6)
        assert (config.optim.optimizer, config.loop.batch_rows) == ("muon", 64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("lss", "unknown command 'lss' (arriero --help lists them); did you mean 'ls'?"),
        ("data bild docstrings", "unknown command 'data bild docstrings' (arriero --help lists them); did you mean 'data build"),
        ("ls modles", "invalid choice 'modles' for argument 'what'. Expected one of ('models', 'presets', 'steps', 'rewards')"),
        ("ls", "Missing from arriero ls: WHAT"),
        ("cp lora-8 a.toml", "no preset 'lora-8'; did you mean 'lora-8b'"),
        ("cp lora-8b a.toml --forc", "Unrecognized options: --forc"),
        ("cp lora-8b a.toml --forc", "Perhaps you meant: --force"),
        ("run", "run: the first argument must be a file as `arriero cp` writes it, or a preset"),
        ("run nix.toml", "nix.toml: no such file; `arriero ls presets` lists what `arriero cp PRESET nix.toml` can write"),
        ("run bad.toml", "bad.toml, line 4: unknown key 'optim.lrr'; did you mean 'lr'"),
        ("run ok.toml --lrr 3", "Unrecognized options: --lrr, 3"),
        ("run ok.toml --lrr 3", "Perhaps you meant: --lr FLOAT"),
        ("run ok.toml --lr fast", "fast"),
        ("run ok.toml --lr 0", "lr is 0.0; it must be a number above 0"),
        ("run empty.toml", 'the key "recipe" is missing; begin the file with: recipe = "sft"'),
        ("run pretrain-9m", "no preset 'pretrain-9m'; did you mean 'pretrain-1m'"),
        ("pretrain ok.toml --data x", "ok.toml configures sft, which is nothing to pretrain: arriero run ok.toml"),
        ("pretrain pretrain-1m --steps 3", "tokens is 2.1e+07 and steps is 3; a run has one length: set the other to 0"),
        ("plan curate-web", "curate-web configures curate, which is nothing to plan: arriero run curate-web"),
        ("plan 30m --data x", "30m has no weights to fine-tune; to plan its pretraining: arriero plan pretrain-30m --data x"),
        ("plan", "Missing from arriero plan: MODEL"),
        ("plan nix.toml", "nix.toml: no such file"),
        ("plan bad.toml", "bad.toml, line 4: unknown key 'optim.lrr'; did you mean 'lr'"),
        ("plan llama3.1-8b --rnk 8", "Perhaps you meant: --rank INT"),
        ("validate", "validate: the first argument must be a file as `arriero cp` writes it, or a preset"),
        ("validate ok.toml --model smolm2-135m", "no model 'smolm2-135m'"),
        ("chat", "Missing from arriero chat: MODEL"),
        ("chat smolm2-135m", "did you mean 'smollm2-135m'?"),
        ("chat smollm2-135m --top-p 2", "top_p is 2.0; it is a probability, in (0, 1]"),
        ("generate smolm2-135m hi", "did you mean 'smollm2-135m'?"),
        ("generate smollm2-135m hi --adaptr x", "Perhaps you meant: --adapter STR"),
        ("data inspect ok.txt", "Missing from arriero data inspect: --model STR"),
        ("data inspect nix.jsonl --model smollm2-135m", "nix.jsonl: no such file or directory"),
        ("data inspect ok.txt --model smolm2-135m", "did you mean 'smollm2-135m'?"),
        ("sft", "Missing from arriero sft: MODEL"),
        ("sft smolm2-135m --data ok.txt", "did you mean 'smollm2-135m'?"),
        ("sft smollm2-135m --data nix.jsonl", "nix.jsonl: no such file or directory"),
        ("sft smollm2-135m", "--data STR"),
        ("sft smollm2-135m --data x --methd lora", "Perhaps you meant: --method {lora,full}"),
        ("sft smollm2-135m --data x --method lara", "Expected one of ('lora', 'full')"),
        ("sft smollm2-135m --data x --batch-rows 3 --micro-rows 2", "batch_rows 3 is not a multiple of micro_rows 2"),
        ("convert smolm2-135m out --to hf", "no model 'smolm2-135m'"),
        ("convert smolm2-135m out --to hf", "did you mean 'smollm2-135m'?"),
        ("convert smollm2-135m out", "Missing from arriero convert: --to {hf,meta,gguf}"),
        ("convert smollm2-135m out --to hg", "Expected one of ('hf', 'meta', 'gguf')"),
        ("convert smollm2-135m full --to hf", "full: exists already; choose another name, or give --force to overwrite it"),
        ("merge smolm2-135m adapter out", "did you mean 'smollm2-135m'?"),
        ("eval smollm2-135m", "--data STR"),
        ("eval smollm2-135m --data nix.jsonl", "nix.jsonl"),
        ("eval smollm2-135m --data ok.txt --windw 3", "Perhaps you meant: --window INT"),
        ("data build docstrings out --source nix", "nix: no such file or directory; give 'stdlib' or a path to Python code"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_code_2_and_a_remedy(
    args: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "ok.txt").write_text("Prose.")
    (tmp_path / "ok.toml").write_text('recipe = "sft"\nmodel = "m"\n[data]\ntrain = "d"\n')
    (tmp_path / "bad.toml").write_text('recipe = "sft"\nmodel = "m"\n[optim]\nlrr = 3e-4\n')
    (tmp_path / "empty.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *args.split())


def test_a_users_mistake_shows_no_traceback_and_ours_does(tmp_path: Path) -> None:
    done = arriero("run", "nix.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("arriero: nix.toml: no such file")
    script = "from arriero import cli; cli.COMMANDS['cp'] = lambda: int('ours'); cli.main(['cp'])"
    broken = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert broken.returncode == 1
    assert "Traceback" in broken.stderr and "invalid literal for int() with base 10: 'ours'" in broken.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    for command in ("ls models", "sft --help"):
        process = subprocess.Popen(
            [sys.executable, "-m", "arriero", *command.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""
        process.stderr.close()


SLEEPING_COMMAND = """
from arriero import cli
cli.COMMANDS["cp"] = lambda: print("on", flush=True) or time.sleep(60)
"""
SLEEPING_IMPORT = """
class Sleep:
    def find_spec(self, name, *_):
        if name == "arriero.cli":
            print("on", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Sleep())
"""


@pytest.mark.parametrize("sleeping", [SLEEPING_COMMAND, SLEEPING_IMPORT], ids=["running", "being imported"])
def test_ctrl_c_ends_with_code_130_and_one_line(sleeping: str) -> None:
    entry = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]["arriero"]
    module, function = entry.split(":")
    script = (
        f"import sys, time\n{sleeping}\nfrom {module} import {function}; sys.argv[1:] = ['cp']; sys.exit({function}())"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"interrupted\n")


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"arriero {version('arriero')}\n"
