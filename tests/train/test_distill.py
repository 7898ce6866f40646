"""Distillation on toy models with the real tokenizer: a teacher's probabilities on disk, and learning from them."""

import dataclasses
import json

import pytest
import torch
from helpers.training import losses, sft_settings
from rich.console import Console

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model
from arriero.errors import ConfigError, UserError
from arriero.tokenizer.load import load_tokenizer
from arriero.train.config import DistillConfig, LoopConfig, OptimConfig
from arriero.train.distill import build, main
from arriero.train.teacher import IDS, LOGQ

QUIET = Console(quiet=True)


@pytest.fixture
def teacher(toy_model, tmp_path):
    """Another toy of the same tokenizer."""
    model = load_model(toy_model).init_weights(std=0.2, seed=23)
    save_hf(model, tmp_path / "teacher", dtype=torch.float32, tokenizer=load_tokenizer(toy_model))
    return tmp_path / "teacher"


def settings(model, rows, out, teacher, **changes) -> DistillConfig:
    base = sft_settings(model, rows, out)
    given = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return DistillConfig(**{**given, "teacher": str(teacher), "samples": 0, **changes})


def test_rows_carry_what_the_teacher_gives_each_trained_token(toy_model, rows, teacher, tmp_path, own_cache):
    run = build(settings(toy_model, rows, tmp_path / "run", teacher, top_k=7), QUIET)
    model, found = load_model(teacher, dtype=torch.float32), 0
    for batch in run.trainer.batches(0):
        at = 0
        for length, lead in zip(batch.documents.lengths, batch.documents.leads, strict=True):
            tokens, rows_of = batch.tokens[0, at : at + length], slice(at, at + length)
            at += length
            trained = batch.targets[0, rows_of] != -100
            if lead >= 0:
                tokens = torch.cat((batch.tokens[0, : batch.documents.lengths[0]], tokens))
            if not trained.any():
                continue
            with torch.no_grad():
                top = model(tokens[None])[0, -length:][trained].log_softmax(1).topk(7)
            ids, logq = (batch.token_extras[name][0, rows_of][trained] for name in (IDS, LOGQ))
            torch.testing.assert_close(logq[:, :7], top.values, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logq[:, 7].exp(), 1 - top.values.exp().sum(1), atol=1e-5, rtol=1e-4)
            assert (ids == top.indices).float().mean() > 0.99  # equal probabilities may come in any order
            found += int(trained.sum())
    assert found > 50


def test_a_student_comes_nearer_to_its_teacher_and_a_second_run_reads_the_disk(
    toy_model, rows, teacher, tmp_path, own_cache, monkeypatch
):
    config = settings(
        toy_model, rows, tmp_path / "run", teacher, share=1.0, method="full", divergence="symmetric",
        optim=OptimConfig(lr=3e-3), loop=LoopConfig(steps=12, batch_rows=4, micro_rows=2, precision="fp32"),
    )  # fmt: skip
    outcome = main(config)
    measured = outcome.progress.validation
    assert measured[12] < 0.9 * measured[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "divergence" in line and "event" not in line]
    assert len(steps) == 12 and all(line["loss"] == pytest.approx(line["divergence"]) for line in steps)
    monkeypatch.setattr("arriero.train.teacher.load_model", None)  # not to be called again
    main(dataclasses.replace(config, out=str(tmp_path / "again")))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_a_teacher_that_is_the_student_teaches_nothing(toy_model, rows, tmp_path, own_cache):
    run = build(settings(toy_model, rows, tmp_path / "run", toy_model, share=1.0), QUIET)
    first = run.trainer.measure()
    assert first["divergence"] == pytest.approx(0, abs=1e-5) and first["cross_entropy"] > 1


def test_bad_settings_and_teachers_are_refused(toy_model, rows, teacher, tmp_path, own_cache):
    with pytest.raises(ConfigError, match="share is 0; it must be above 0"):
        settings(toy_model, rows, tmp_path / "run", teacher, share=0)
    with pytest.raises(ConfigError, match="teacher is missing; name one: --teacher MODEL"):
        build(settings(toy_model, rows, tmp_path / "run", ""), QUIET)
    with pytest.raises(UserError, match=r"no model .*nowhere"):
        build(settings(toy_model, rows, tmp_path / "run", tmp_path / "nowhere"), QUIET)
    with pytest.raises(ConfigError, match=r"top_k is 1,000,000; the teacher has"):
        build(settings(toy_model, rows, tmp_path / "run", teacher, top_k=10**6), QUIET)
