"""On-policy distillation: the whole divergence on the student's own tokens, and runs that resume bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.answering import Killed, killed_in, result

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model
from arriero.errors import ConfigError
from arriero.show.terminal import notes
from arriero.tokenizer.load import load_tokenizer
from arriero.train import on_policy_distill
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.metrics import surviving_records
from arriero.train.on_policy_distill import main, rows_of
from arriero.train.policy import dealt
from arriero.train.recipe import execute
from arriero.train.rl import RlRun
from arriero.train.rl_config import OnPolicyDistillConfig, PromptConfig, RolloutConfig


@pytest.fixture(scope="module")
def teacher(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another toy of the same tokenizer."""
    directory = tmp_path_factory.mktemp("teacher") / "model"
    model = load_model(toy_model).init_weights(std=0.2, seed=23)
    save_hf(model, directory, dtype=torch.float32, tokenizer=load_tokenizer(toy_model))
    return directory


def settings(
    toy_model: Path, prompts: Path, out: Path, teacher: Path, steps: int = 4, **more: Any
) -> OnPolicyDistillConfig:
    values: dict[str, Any] = {
        "rollout": RolloutConfig(answers=3, max_new_tokens=7, truncated="score", validation_answers=2, at_once=16),
        "loop": LoopConfig(steps, batch_rows=4, micro_rows=2, precision="fp32", save_every=1, validate_every=steps),
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        "data": PromptConfig(train=str(prompts), validation=str(prompts.parent / "held-out.jsonl")),
    }
    return OnPolicyDistillConfig(model=str(toy_model), out=str(out), teacher=str(teacher), samples=2, **(values | more))


def built(config: OnPolicyDistillConfig) -> RlRun:
    return on_policy_distill.build(config, notes(quiet=True))


@pytest.mark.parametrize("kind", ["forward", "reverse", "symmetric"])
def test_loss_and_gradient_are_the_whole_divergence_of_each_answer_alone(
    toy_model: Path, prompts: Path, tmp_path: Path, teacher: Path, kind: Any
) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run", teacher, method="full", divergence=kind))
    engine, prompts_of = run.prepared.tuned.engine, run.prepared.prompts
    rollout = run.prepared.rollouts(0)
    rows = rows_of(run.prepared, prompts_of, rollout.groups)
    batches = [batch for _, batch in dealt(rows, 2, engine, True)]
    loss = engine.forward_backward(batches, run.trainer.learner.objective).loss
    student, other = engine.model, load_model(teacher, dtype=torch.float32)
    found = {name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None}
    total, tokens = torch.zeros(()), 0
    for group in rollout.groups:
        prompt = prompts_of[group.prompt].ids
        for answer in group.answers:
            ids = torch.tensor([[*prompt, *answer.ids]])
            chosen = slice(len(prompt) - 1, -1)
            logp, logq = (m(ids)[0, chosen].float().log_softmax(-1) for m in (student, other))
            forward = (logq.exp() * (logq - logp)).sum()
            reverse = (logp.exp() * (logp - logq)).sum()
            total = total + {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kind]
            tokens += len(answer.ids)
    assert loss == pytest.approx(total.item() / tokens, rel=1e-4)
    wanted = torch.autograd.grad(total / tokens, [engine.parameters[name] for name in found])
    for (name, mine), theirs in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3, msg=name)


def test_a_student_comes_nearer_to_its_teacher_and_nothing_is_said_of_rewards(
    toy_model: Path, prompts: Path, tmp_path: Path, teacher: Path
) -> None:
    main(settings(toy_model, prompts, tmp_path / "run", teacher, 12, method="full", top_k=64))
    records = surviving_records(tmp_path / "run" / "metrics.jsonl")
    validation = [record for record in records if record.get("event") == "validation"]
    assert validation[-1]["loss"] == validation[-1]["divergence"] < 0.8 * validation[0]["divergence"]
    assert not any("reward" in name for record in records for name in record)
    assert "[reward" not in validation[0]["samples"][0]
    assert "validation loss from" in (tmp_path / "run" / "report.html").read_text()


def test_a_teacher_that_is_the_student_teaches_nothing_and_answers_may_be_watched(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run", toy_model, reward="exact"))
    assert run.trainer.measure()["divergence"] == pytest.approx(0, abs=1e-5)
    first = run.trainer.step()
    assert first["loss"] == pytest.approx(0, abs=1e-5) and first["reward"] == 0


def test_a_run_killed_while_it_samples_goes_on_to_the_same_bits(
    toy_model: Path, prompts: Path, tmp_path: Path, teacher: Path
) -> None:
    def train(config: OnPolicyDistillConfig, changed: Any = lambda run: None) -> None:
        def build(c: OnPolicyDistillConfig, console: Any, mesh: Any) -> RlRun:
            run = on_policy_distill.build(c, console, mesh)
            changed(run)
            return run

        execute(config, "on_policy_distill", build)

    train(settings(toy_model, prompts, tmp_path / "whole", teacher))
    config = settings(toy_model, prompts, tmp_path / "killed", teacher)
    with pytest.raises(Killed):
        train(config, killed_in("sampled", 3))
    train(dataclasses.replace(config, resume=True))
    whole, resumed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_teacher_that_is_missing_or_speaks_otherwise_is_refused(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="teacher is missing; name one: --teacher MODEL"):
        built(OnPolicyDistillConfig(model=str(toy_model), out=str(tmp_path), data=PromptConfig(str(prompts))))
    with pytest.raises(ConfigError, match="top_k is -1; it must be at least 0"):
        OnPolicyDistillConfig(top_k=-1)
