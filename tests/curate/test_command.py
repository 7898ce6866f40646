"""`arriero curate` as a person types it: presets, files, settings by name, and the mistakes people make."""

import json
import re

import pytest

from arriero import cli, presets
from arriero.curate.config import KINDS, CurateConfig

from .conftest import kept, prose


def refused(capsys, *argv):
    assert cli.main(list(argv)) == 2
    return capsys.readouterr().err


def curated(capsys, *argv):
    assert cli.main(["curate", *map(str, argv), "--workers", "1"]) == 0
    return capsys.readouterr()


def test_a_run_ends_with_a_short_funnel_and_the_way_to_the_report(corpus, tmp_path, capsys):
    said = curated(capsys, corpus, "--out", tmp_path / "out")
    assert f"{tmp_path / 'out'} written: 106 documents; look at {tmp_path / 'out' / 'report.html'}" in said.out
    table = [line.split() for line in said.err.replace("│", " ").splitlines()]
    assert ["read", "113"] in table
    assert ["near-dedup", "1", "0", "106", "near", "duplicate", "(1)"] in table


def test_steps_and_settings_are_given_by_name(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    curated(
        capsys, corpus, "--out", out, "--steps", "language", "gopher-quality", "--format", "jsonl.zst",
        "--set", "language.keep=de", "gopher_quality.min_stop_words=0", "part_mb=0.5",
    )  # fmt: skip
    assert [d.id for d in kept(out) if d.source != "code"] == ["german"]
    config = json.loads((out / "manifest.json").read_text())["plan"]["config"]
    assert config["language"]["keep"] == ["de"] and config["gopher_quality"]["min_stop_words"] == 0


def test_a_preset_copied_to_a_file_is_run_by_run_and_by_curate(corpus, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    assert cli.main(["cp", "curate-code", str(file)]) == 0
    curated(capsys, corpus, "--preset", file, "--out", tmp_path / "a")
    assert cli.main(["run", str(file), str(corpus), "--out", str(tmp_path / "b"), "--workers", "1"]) == 0
    assert kept(tmp_path / "a") == kept(tmp_path / "b")


def test_the_written_config_does_the_same_again(corpus, tmp_path, capsys):
    curated(capsys, corpus, "--out", tmp_path / "a", "--set", "part_mb=0.5")
    curated(capsys, "--preset", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    assert kept(tmp_path / "a") == kept(tmp_path / "b")


def test_the_steps_are_listed_each_with_what_it_does(capsys):
    assert cli.main(["ls", "steps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(KINDS)
    assert all(line.endswith(".") for line in lines)
    assert re.search("^url-dedup +prose/code +Keep the newest of documents with the same URL", lines[11])


def test_files_of_a_directory_that_are_no_documents_are_told(corpus, tmp_path, capsys):
    (corpus / "scan.pdf").touch()
    assert "passed over in directories: 1 .pdf" in curated(capsys, corpus, "--out", tmp_path / "out").err


@pytest.mark.parametrize("name", ["curate-web", "curate-prose", "curate-code"])
def test_presets_are_curations(name):
    recipe, config = presets.get(name)
    assert recipe == "curate" and isinstance(config, CurateConfig)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("curate --out x", "no sources; give files, directories, 'stdlib' or Hub data set ids"),
        ("curate stdlib", "no output directory; give one with --out DIR"),
        ("curate stdlib --out x --preset curate-wep", "no preset 'curate-wep'; did you mean 'curate-web'"),
        ("curate stdlib --out x --preset lora-8b", "lora-8b is no preset of curation"),
        ("curate stdlib --out x --set language.keep", "--set language.keep: write NAME=VALUE"),
        (
            "curate stdlib --out x --set gopher_quality.min_words=30",
            "gopher_quality was set, but steps has no 'gopher-quality'; name it in --steps, or leave that out",
        ),
        ("curate stdlib --out x --set min_words=3", "'min_words' is the name of several settings; write one of"),
        (
            "curate stdlib --out x --set language.keep=english",
            "language.keep has 'english', which the model does not know; did you mean 'en'?",
        ),
        ("curate stdlib --out x --steps normalize", "'normalize', which is no step; did you mean 'normalise'?"),
        (
            "curate nothing.jsonl --out x",
            "nothing.jsonl: no such file or directory; give a file, a directory, 'stdlib'",
        ),
    ],
)
def test_mistakes_are_answered_with_the_remedy(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments.split())
    assert not (tmp_path / "x").exists()


def test_other_recipes_commands_say_what_to_do_with_a_curation(tmp_path, capsys):
    assert cli.main(["cp", "curate-web", str(tmp_path / "a.toml")]) == 0
    said = refused(capsys, "validate", str(tmp_path / "a.toml"))
    assert "configures curate, which is nothing to validate: arriero run" in said


def test_a_classifier_is_trained_by_one_command_and_says_how_good_it_is(tmp_path, capsys):
    for name, word in (("good", "llama"), ("bad", "click")):
        rows = [json.dumps({"text": f"{prose(i)} {word} {word}."}) + "\n" for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    out = tmp_path / "q.safetensors"
    argv = ["curate", "classifier", tmp_path / "good.jsonl", "--against", tmp_path / "bad.jsonl", "--out", out]
    assert cli.main([*map(str, argv), "--held-out", "0.3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out} written; on ") and "balanced accuracy" in said
    assert "chance 50%)" in said and "(chance 0.5)" in said and "95% interval" in said
    assert out.exists()
