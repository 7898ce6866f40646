"""PPO: two learners on one frozen base; what is trained on, against a plain loop; killed and resumed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.answering import ByRule, Killed, killed_in, result
from helpers.training import assert_same

from arriero.checkpoint.sharded import Checkpoints
from arriero.errors import ConfigError
from arriero.show.terminal import notes
from arriero.train import ppo
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.metrics import surviving_records
from arriero.train.policy import dealt
from arriero.train.recipe import execute
from arriero.train.rl import RlRun
from arriero.train.rl_config import PolicyConfig, PpoConfig, PromptConfig, RolloutConfig, ValueConfig
from arriero.train.rollouts import Rollout


def settings(toy_model: Path, asked: Path, out: Path, steps: int = 3, **more: Any) -> PpoConfig:
    values: dict[str, Any] = {
        "rollout": RolloutConfig(answers=2, max_new_tokens=6, truncated="score", validation_answers=2, at_once=16),
        "loop": LoopConfig(steps, batch_rows=6, micro_rows=2, precision="fp32", save_every=1, validate_every=steps),
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        "data": PromptConfig(train=str(asked), validation=str(asked.parent / "held-out.jsonl")),
        "value": ValueConfig(warmup_steps=0),
        "policy": PolicyConfig(clip_high=0.2, kl=0.05, kl_in="reward", kl_kind="k1", updates=2),
    }
    return PpoConfig(model=str(toy_model), out=str(out), samples=2, **(values | more))


def train(config: PpoConfig, changed: Any = lambda run: None) -> None:
    def build(c: PpoConfig, console: Any, mesh: Any) -> RlRun:
        run = ppo.build(c, console, mesh, ByRule())
        changed(run)
        return run

    execute(config, "ppo", build)


def built(config: PpoConfig) -> RlRun:
    return ppo.build(config, notes(quiet=True), None, ByRule())


def test_a_run_leaves_its_record_and_one_killed_in_an_update_goes_on_to_the_same_bits(
    toy_model: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    train(settings(toy_model, prompts, tmp_path / "whole"))
    config = settings(toy_model, prompts, tmp_path / "killed")
    with pytest.raises(Killed):
        train(config, killed_in("step", 3))  # of the policy, between the two updates of step 2
    train(dataclasses.replace(config, resume=True))
    whole, resumed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    one, two = (Checkpoints(tmp_path / name).latest() for name in ("whole", "killed"))
    assert one is not None and two is not None
    for group in ("weights", "optimizer", "value-weights", "value-optimizer"):
        assert_same(one.tensors(group), two.tensors(group))
    steps = [r for r in surviving_records(tmp_path / "whole" / "metrics.jsonl") if "event" not in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    assert all(r["value/loss"] > 0 and math.isfinite(r["explained_variance"]) for r in steps)
    assert steps[0]["kl_from_start"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl_from_start"] != 0


def test_policy_value_and_reference_are_one_base_in_memory(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run"))
    policy, value = (learner.engine.model for learner in run.trainer.learners.values())
    frozen = [p for p in value.parameters() if not p.requires_grad]
    theirs = {p.data_ptr() for p in policy.parameters()}
    assert len(frozen) > 10 and all(p.data_ptr() in theirs for p in frozen)
    trained = run.trainer.learners["value"].parameters
    assert "value.weight" in trained and all(p.dtype == torch.float32 for p in trained.values())
    assert not {p.data_ptr() for p in trained.values()} & theirs


def test_rewards_stand_at_the_last_token_and_the_divergence_at_each(
    toy_model: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    """Advantages and returns against a loop over answers and tokens, from the values that the rows carry."""
    value = ValueConfig(warmup_steps=0, gamma=0.9, gae_lambda=0.8, whiten_advantages=False)
    run = built(settings(toy_model, prompts, tmp_path / "run", value=value))
    for step in range(2):
        run.trainer.update(run.prepared.rollouts(step))  # so that policy and reference are apart
    rollout: Rollout = run.prepared.rollouts(2)
    update: Any = run.trainer.update
    rows, told = update.rows(rollout)
    assert len(rows) == 6 and "kl_from_start" in told
    for g, row in enumerate(rows):
        e, bounds = row.token_extras, np.concatenate([[0], np.cumsum(row.lengths)])
        for k in range(2):
            span = slice(bounds[-3 + k], bounds[-2 + k])
            old, reference, values = (e[name][span].astype(float) for name in ("old", "reference", "values"))
            n, after, wanted = len(old), 0.0, []
            assert n == len(rollout.groups[g].answers[k].ids)
            for t in reversed(range(n)):
                reward = -0.05 * (old[t] - reference[t]) + (float(rollout.rewards[g, k]) if t == n - 1 else 0.0)
                following = values[t + 1] if t < n - 1 else 0.0
                after = reward + 0.9 * following - values[t] + 0.9 * 0.8 * after
                wanted.append(after)
            assert e["advantages"][span].tolist() == pytest.approx(wanted[::-1], abs=1e-5)
            assert e["returns"][span] == pytest.approx(np.asarray(wanted[::-1]) + values, abs=1e-5)
        assert not e["mask"][: bounds[-3]].any() and not e["advantages"][: bounds[-3]].any()


def test_cut_answers_get_no_reward_and_no_row(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run"))
    rollout = run.prepared.rollouts(0)
    mask = rollout.mask.clone()
    mask[:, 0] = 0
    mask[2] = 0
    update: Any = run.trainer.update
    rows, _ = update.rows(dataclasses.replace(rollout, mask=mask))
    assert len(rows) == 5 and all(len(row.lengths) == 2 for row in rows)  # the prompt, and one answer
    none, _ = update.rows(dataclasses.replace(rollout, mask=torch.zeros_like(mask)))
    assert none == []


def test_the_first_ratio_is_1_and_accumulation_gives_one_gradient(
    toy_model: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run"))
    update: Any = run.trainer.update
    rows, _ = update.rows(run.prepared.rollouts(0))
    for learner in (update.policy, update.value):
        found = []
        for micro_rows in (1, 2, 4):
            for p in learner.parameters.values():
                p.grad = None
            batches = [batch for _, batch in dealt(rows[:4], micro_rows, learner.engine, False)]
            totals = learner.engine.forward_backward(batches, learner.objective)
            found.append([totals.loss, *(p.grad for p in learner.parameters.values() if p.grad is not None)])
            if learner is update.policy and micro_rows == 2:
                assert totals.metrics["ratio"] == 1.0
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                a, b = torch.as_tensor(a), torch.as_tensor(b)
                torch.testing.assert_close(a, b, atol=1e-5 * (float(b.abs().max()) or 1), rtol=1e-5)


def test_the_value_learns_first_where_that_is_asked(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run", value=ValueConfig(warmup_steps=1)))
    update: Any = run.trainer.update
    before = {name: p.detach().clone() for name, p in update.policy.parameters.items()}
    first = run.trainer.update(run.prepared.rollouts(0))
    assert first["loss"] == 0 and first["value/loss"] > 0
    assert all(torch.equal(p, before[name]) for name, p in update.policy.parameters.items())
    run.trainer.update(run.prepared.rollouts(1))
    assert any(not torch.equal(p, before[name]) for name, p in update.policy.parameters.items())


def test_a_value_model_learns_what_reward_is_to_come(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    value = ValueConfig(warmup_steps=99, value_lr=1e-2, gae_lambda=1.0)
    run = built(settings(toy_model, prompts, tmp_path / "run", value=value))
    rollout = run.prepared.rollouts(0)
    losses = [run.trainer.update(rollout)["value/loss"] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_ppo_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="ppo learns from every answer"):
        PpoConfig(rollout=RolloutConfig(answers=1, dynamic=1))
    with pytest.raises(ConfigError, match=r"gae_lambda is 2; it is in \[0, 1\]"):
        ValueConfig(gae_lambda=2)
