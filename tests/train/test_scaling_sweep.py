"""A sweep of toy models for real: every run done once, whatever stops it, and each exactly as `pretrain` does it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from arriero import cli, presets, settings
from arriero.errors import ConfigError, DataError, TrainingError
from arriero.model.catalogue import LADDER
from arriero.train import pretrain
from arriero.train.config import PretrainConfig
from arriero.train.loop import Outcome
from arriero.train.metrics import surviving_records
from arriero.train.scaling.config import SweepConfig
from arriero.train.scaling.fit import fit
from arriero.train.scaling.run_fit import read_runs
from arriero.train.scaling.sweep import family, planned_runs, pretrain_config, sweep

QUIET = Console(quiet=True)


def toy(shards: Path, out: Path, **changes: object) -> SweepConfig:
    """Two budgets of four models each, a few steps a run: far too short to learn anything."""
    config = SweepConfig(
        data=str(shards),
        out=str(out),
        budgets=(1e9, 2e9),
        sizes=4,
        seq_len=67,
        validation_tokens=211,
        batch_rows=2,
        precision="fp32",
        compile="off",
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def swept(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    config = toy(shards, tmp_path_factory.mktemp("swept") / "sweep")
    assert sweep(config, QUIET) is not None
    return config


def test_the_family_passes_through_the_ladder() -> None:
    assert family(128, 2048, 1024) == LADDER["1m"]
    assert family(512, 8192, 1024) == LADDER["30m"]
    widths = [family(width, 8192, 1024) for width in (32, 64, 224, 256, 320, 1024, 4096)]
    sizes = [shape.n_params for shape in widths]
    assert sizes == sorted(sizes)
    assert [shape.n_layers for shape in widths] == [1, 2, 4, 4, 5, 16, 64]


def test_a_budget_is_spent_by_every_model_and_rate_and_batch_follow_it() -> None:
    config = SweepConfig(data="x", budgets=(1e17, 1e15), sizes=6, seeds=2, seq_len=512)
    runs = planned_runs(config, vocab_size=2048)
    assert len(runs) == 2 * 6 * 2
    assert len({run.name for run in runs}) == len(runs)
    assert [run.flops for run in runs] == sorted(run.flops for run in runs)
    for run in runs:
        assert 6 * run.shape.n_params * run.tokens == pytest.approx(run.flops)
        told = pretrain_config(run, config)
        assert told.loop.steps * told.loop.batch_rows * 512 == pytest.approx(run.tokens, rel=0.01)
        assert told.loop.batch_rows % told.loop.micro_rows == 0
        assert told.loop.micro_rows * 512 <= config.micro_tokens
    small, large = runs[0], runs[-1]
    assert (small.lr, small.batch_rows) == (pytest.approx(0.3118 * 1e15**-0.125), round(0.292 * 1e15**0.3271 / 512))
    assert small.lr > large.lr and small.batch_rows < large.batch_rows
    of_small = [run.shape.n_params for run in runs if run.flops == 1e15]
    assert min(of_small) < (1e15 / 120) ** 0.5 / 3 and max(of_small) > (1e15 / 120) ** 0.5 * 3
    longer = planned_runs(dataclasses.replace(config, tokens_per_param=320.0), vocab_size=512)
    middle = math.prod(run.tokens / run.shape.n_params for run in longer) ** (1 / len(longer))
    assert middle == pytest.approx(320, rel=0.3)  # the family has few small members


def test_every_run_is_recorded_with_the_loss_that_its_own_report_shows(swept: SweepConfig) -> None:
    out = Path(swept.out)
    records = surviving_records(out / "runs.jsonl")
    names = [run.name for run in planned_runs(swept, 512)]
    assert [record["name"] for record in records] == names
    assert len(names) == 8
    for record in records:
        run_dir = out / "runs" / record["name"]
        validations = [r for r in surviving_records(run_dir / "metrics.jsonl") if r.get("event") == "validation"]
        assert [v["step"] for v in validations] == [0, record["steps"]]
        assert record["loss"] == validations[-1]["loss"] < validations[0]["loss"]
        assert (run_dir / "model" / "model.safetensors").exists()
        assert not (run_dir / "checkpoints").exists() and not (run_dir / "init").exists()
        assert record["tokens"] == 2 * 67 * record["steps"]
    runs = read_runs(out)
    assert len(runs.budgets) == 2 and len(runs) == len(records)


def test_a_run_is_what_pretrain_makes_of_the_same_settings(swept: SweepConfig, tmp_path: Path) -> None:
    record = surviving_records(Path(swept.out) / "runs.jsonl")[0]
    _, told = settings.load_recipe(presets.RECIPES, Path(swept.out) / "runs" / record["name"] / "config.toml")
    again = dataclasses.replace(swept, out=str(tmp_path))
    from arriero.checkpoint.hf import save_hf
    from arriero.model.llama import Llama
    from arriero.tokenizer import load_tokenizer

    shape = planned_runs(again, 512)[0].shape
    tokenizer = load_tokenizer(Path(swept.data) / "tokenizer")
    save_hf(Llama(shape).init_weights(seed=0, depth_scaled=True), tmp_path / "init", tokenizer, dtype=torch.float32)
    outcome = pretrain.main(dataclasses.replace(told, model=str(tmp_path / "init"), out=str(tmp_path / "run")))
    assert outcome.progress.validation[record["steps"]] == record["loss"]


def test_a_stopped_sweep_goes_on_where_it_was_and_ends_with_the_same_losses(
    swept: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(swept, out=str(tmp_path / "sweep"))
    file = Path(shutil.copytree(swept.out, config.out)) / "runs.jsonl"
    expected = surviving_records(file)
    for record in expected[-2:]:
        shutil.rmtree(file.parent / "runs" / record["name"])
    file.write_text("".join(json.dumps(record) + "\n" for record in expected[:-2]))
    started, original, steps = [], pretrain.main, []
    step = pretrain.Trainer.step

    def counted(told: PretrainConfig) -> Outcome:
        started.append(Path(told.out).name)
        return original(told)

    def stopped_in_the_third(trainer: pretrain.Trainer) -> dict[str, object]:
        steps.append(trainer.progress.step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(pretrain, "main", counted)
    monkeypatch.setattr(pretrain.Trainer, "step", stopped_in_the_third)
    outcome = sweep(config, QUIET)
    assert outcome is not None and outcome.interrupted is signal.SIGTERM
    assert len(surviving_records(file)) == len(expected) - 2
    sweep(config, QUIET)
    names = [record["name"] for record in expected]
    assert started == [names[-2], names[-2], names[-1]]  # what was done is not done again
    assert steps[:4] == [0, 1, 2, 3]  # nor the steps of the run that was stopped
    for before, after in zip(expected, surviving_records(file), strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert sweep(config, QUIET) is None  # nothing is left to do


def test_budgets_may_be_added_but_not_other_settings_or_data(
    swept: SweepConfig, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(swept.out, tmp_path / "sweep")
    copy = dataclasses.replace(swept, out=str(tmp_path / "sweep"))
    started = []

    def stop(told: object) -> None:
        started.append(told)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "main", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(dataclasses.replace(copy, budgets=(1e9, 1.5e9, 2e9)), QUIET)
    assert len(started) == 1 and "/1.5e+09-" in started[0].out
    with pytest.raises(ConfigError, match=r"sweep\.toml: this sweep was begun with other settings \(seq_len, lr\), so"):
        sweep(dataclasses.replace(copy, seq_len=71, lr=1e-3), QUIET)
    data = tmp_path / "sweep" / "data.json"
    written = data.read_text()
    for what in ("source", "validation source"):
        data.write_text(re.sub(f'("{what} .*": )"[0-9a-f]{{64}}"', rf'\1"{"0" * 64}"', written))
        with pytest.raises(DataError, match=rf"^{what} .* has changed since the sweep in .* began"):
            sweep(copy, QUIET)


def test_a_run_that_ends_without_a_loss_is_no_run_of_the_sweep(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.Trainer, "measure", lambda trainer: {"loss": math.nan})
    with pytest.raises(TrainingError, match=r"ended with a loss of nan, .* sweep again with an lr below 0\.\d+, into"):
        sweep(toy(shards, tmp_path / "sweep"), QUIET)
    assert not surviving_records(tmp_path / "sweep" / "runs.jsonl")


def test_what_cannot_be_swept_is_refused_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget 1e\+08: a model of 131,392 parameters gets 127 tokens, less than"):
        sweep(toy(shards, tmp_path / "a", budgets=(1e8, 1e9)), QUIET)
    with pytest.raises(ConfigError, match=r"holds no held-out documents.* arriero shard \.\.\. --validation 0\.01"):
        lone = shutil.copytree(shards / "train", tmp_path / "lone" / "sets")
        shutil.copytree(shards / "tokenizer", tmp_path / "lone" / "tokenizer")
        sweep(toy(Path(lone), tmp_path / "b"), QUIET)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": (1e12,)}, r"budgets is \(1000000000000\.0,\); a power law needs at least two: --budgets 1e12"),
        ({"budgets": (1e12, -1.0)}, "budgets is .*; each must be above 0"),
        ({"budgets": (1e12, math.inf)}, "budgets is inf; it must be a finite number"),
        ({"budgets": (1e12, 3e12, 1.02e12)}, r"has 1e\+12 and 1\.02e\+12, which `arriero scaling fit` takes for one"),
        ({"lr": math.nan}, "lr is nan; it must be a finite number"),
        ({"tokens_per_param": math.nan}, "tokens_per_param is nan; it must be a finite number"),
        ({"sizes": 3}, r"sizes is 3; it must be in 4 \(three models always lie on a parabola\) to 24"),
        ({"spread": 1.0}, "spread is 1.0; it must be above 1"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"micro_tokens": 100}, "micro_tokens is 100; it must hold a row of 512"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SweepConfig(**changes)  # type: ignore[arg-type]


def test_the_command_line_sweeps_and_the_fit_reads_it(
    shards: Path, swept: SweepConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(swept.out, out)
    flags = "--budgets 1e9 2e9 --sizes 4 --seq-len 67 --validation-tokens 211 --batch-rows 2"
    command = ["scaling", "sweep", "--data", str(shards), "--out", str(out), *flags.split()]
    assert cli.main([*command, "--precision", "fp32", "--compile", "off"]) == 0  # all done: says so
    said = " ".join(capsys.readouterr().err.split())
    assert "fit laws to them: arriero scaling fit" in said
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    for line in lines:  # losses that mean something, in the place of those of a few steps
        line["loss"] = 2.0 + 400 * line["params"] ** -0.5 + 90 * line["tokens"] ** -0.5
    (out / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fit(read_runs(out), resamples=2).loss.alpha == pytest.approx(0.5, rel=0.01)
