"""DPO on own answers: pairs are the best and the worst, their loss that of plain rows; runs resume bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.answering import ByRule, Killed, assert_equal_runs, killed_in
from torch import Tensor

from arriero.errors import ConfigError
from arriero.show.terminal import notes
from arriero.train import online_dpo
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.metrics import surviving_records
from arriero.train.policy import dealt
from arriero.train.preference_config import OnlineDpoConfig
from arriero.train.preference_objective import preference_objective
from arriero.train.recipe import execute
from arriero.train.rl import RlRun
from arriero.train.rl_config import PromptConfig, RolloutConfig


def settings(toy_model: Path, prompts: Path, out: Path, steps: int = 4, **more: Any) -> OnlineDpoConfig:
    values: dict[str, Any] = {
        "rollout": RolloutConfig(answers=5, max_new_tokens=7, truncated="score", validation_answers=2, at_once=16),
        "loop": LoopConfig(steps, batch_rows=4, micro_rows=2, precision="fp32", save_every=1, validate_every=steps),
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        "data": PromptConfig(train=str(prompts), validation=str(prompts.parent / "held-out.jsonl")),
    }
    return OnlineDpoConfig(model=str(toy_model), out=str(out), samples=2, **(values | more))


def train(config: OnlineDpoConfig, changed: Any = lambda run: None) -> None:
    def build(c: OnlineDpoConfig, console: Any, mesh: Any) -> RlRun:
        run = online_dpo.build(c, console, mesh, ByRule())
        changed(run)
        return run

    execute(config, "online_dpo", build)


def built(config: OnlineDpoConfig) -> RlRun:
    return online_dpo.build(config, notes(quiet=True), None, ByRule())


def test_a_run_raises_its_reward_and_records_what_pairs_tell(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    rollout = RolloutConfig(
        answers=16, max_new_tokens=5, truncated="score", validation_answers=4, at_once=64, temperature=0.1
    )  # random weights say anything: cooler, they say some things more often
    config = settings(toy_model, prompts, tmp_path / "run", 10, method="full", rollout=rollout, beta=0.02)
    train(config)
    records = surviving_records(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if "event" not in record]
    first = steps[0]
    assert first["margin"] == pytest.approx(0, abs=1e-5) and first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["pairs"] == 4 and first["reward_gap"] > 0
    assert sum(step["margin"] for step in steps) > 0  # of single steps it may not be: each has pairs of its own
    validation = [record for record in records if record.get("event") == "validation"]
    assert validation[-1]["reward"] > 1.5 * validation[0]["reward"] > 0
    assert validation[-1]["kl"] > validation[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert "validation reward from" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("part", "at"), [("sampled", 3), ("step", 2)])
def test_a_run_killed_while_it_samples_or_updates_goes_on_to_the_same_bits(
    toy_model: Path, prompts: Path, tmp_path: Path, part: str, at: int
) -> None:
    train(settings(toy_model, prompts, tmp_path / "whole", nll=0.2))
    config = settings(toy_model, prompts, tmp_path / "killed", nll=0.2)
    with pytest.raises(Killed):
        train(config, killed_in(part, at))
    train(dataclasses.replace(config, resume=True))
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def logprob(run: RlRun, prompt: Any, ids: list[int]) -> Tensor:
    """log p of an answer, by one plain forward of it alone."""
    tokens = torch.tensor([[*prompt, *ids]])
    logp = run.prepared.tuned.engine.model(tokens)[0].float().log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).sum()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_gradient_are_those_of_the_best_and_the_worst_alone(
    toy_model: Path, prompts: Path, tmp_path: Path, method: Any
) -> None:
    config = settings(toy_model, prompts, tmp_path / "run", method=method, nll=0.3, beta=0.7)
    run = built(config)
    update, engine = run.trainer.update, run.prepared.tuned.engine
    update(run.prepared.rollouts(0))  # the policy is no longer its reference
    rollout = run.prepared.rollouts(1)
    rows, _ = update.rows(rollout)  # type: ignore[attr-defined]
    batches = update._with_reference([b for _, b in dealt(rows, 2, engine, True)])  # type: ignore[attr-defined]
    for p in engine.parameters.values():
        p.grad = None
    loss = engine.forward_backward(batches, preference_objective(config)).loss
    found = {name: p.grad for name, p in engine.parameters.items()}
    total = torch.zeros(())
    pairs = []
    for g, rewards in zip(rollout.groups, rollout.rewards.tolist(), strict=True):
        ids = [g.answers[rewards.index(pick(rewards))].ids for pick in (max, min)]
        pairs.append((run.prepared.prompts[g.prompt].ids, ids))
    with run.prepared.reference.acting(), torch.no_grad():
        before = [[logprob(run, prompt, ids) for ids in pair] for prompt, pair in pairs]
    for (prompt, pair), was in zip(pairs, before, strict=True):
        now = [logprob(run, prompt, ids) for ids in pair]
        margin = (now[0] - was[0]) - (now[1] - was[1])
        total = total - F.logsigmoid(0.7 * margin) / len(rows) - 0.3 * now[0] / len(pair[0]) / len(rows)
    assert loss == pytest.approx(total.item(), rel=1e-4)
    gradient = torch.autograd.grad(total, list(engine.parameters.values()))
    for (name, mine), theirs in zip(found.items(), gradient, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3, msg=name)


def test_prompts_whose_answers_are_alike_or_cut_are_in_no_pair(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run"))
    rollout = run.prepared.rollouts(0)
    rewards = torch.tensor([[1.0] * 5, [0, 1, 0, 1, 0], [5, 1, 1, 1, 0], [0, 3, 0, 0, 0]])
    mask = torch.ones(4, 5)
    mask[2, [0, 4]] = mask[3, [0, 2, 3, 4]] = 0  # what is left of these is alike, or alone
    update = run.trainer.update
    rows, gap = update.rows(dataclasses.replace(rollout, rewards=rewards, mask=mask))  # type: ignore[attr-defined]
    assert len(rows) == 1 and gap == 1
    before = {name: p.clone() for name, p in run.trainer.learner.parameters.items()}
    told = update(dataclasses.replace(rollout, rewards=rewards, mask=torch.zeros(4, 5)))
    assert told["pairs"] == 0 and told["loss"] == 0
    assert all(torch.equal(p, before[name]) for name, p in run.trainer.learner.parameters.items())


def test_what_makes_no_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="answers is 1; a pair is made of the best and the worst of at least 2"):
        OnlineDpoConfig(rollout=RolloutConfig(answers=1))
    with pytest.raises(ConfigError, match="loss is orpo and nll 0"):
        OnlineDpoConfig(loss="orpo")
