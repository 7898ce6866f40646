"""Reinforcement learning from groups of answers that judge each other: the recipe behind `arriero grpo`.

GRPO (arXiv 2402.03300, section 4.1) and its relatives: no value model, an answer's advantage is how much better than
the others of its group it was. What is sampled and scored is rollouts.py's, losses and their papers are in
losses/policy.py and losses/advantages.py; docs/rl.md says which to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from arriero.data.batch import Row
from arriero.distributed.mesh import Mesh
from arriero.losses.advantages import batch_normalised, group_normalised, leave_one_out, varied
from arriero.losses.policy import kl_estimate
from arriero.rewards.base import Scorer
from arriero.train.learner import Learner
from arriero.train.loop import Outcome, Trainer
from arriero.train.policy import PolicyObjective, dealt, evaluated, group_row, logprobs_of, with_extra
from arriero.train.recipe import alone, execute
from arriero.train.rl import (
    HeldOutAnswers,
    Prepared,
    RlRun,
    check_mismatch,
    open_rewards,
    prepare,
    unchanged,
    warn_of,
)
from arriero.train.rl_config import GrpoConfig
from arriero.train.rollouts import Rollout


def main(config: GrpoConfig) -> Outcome:
    """Train as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    with open_rewards(config) as scorer:
        return execute(config, "grpo", lambda c, console, mesh: build(c, console, mesh, scorer))


def build(config: GrpoConfig, console: Console, mesh: Mesh | None = None, scorer: Scorer | None = None) -> RlRun:
    """Everything up to step 1."""
    scorer = scorer or open_rewards(config)
    prepared = prepare(config, console, mesh or alone(), scorer)
    objective = PolicyObjective(config.policy, config.rollout.temperature)
    updates = prepared.steps * config.policy.updates * config.policy.passes
    learner = prepared.tuned.learner(objective(), updates)
    held_out = HeldOutAnswers(prepared)
    trainer = Trainer(
        learner, prepared.rollouts, prepared.steps, config.loop, Path(config.out),
        None if prepared.held_out is None else held_out, prepared.tuned.sidecars,
        update=GroupUpdate(config, prepared, learner, objective), journal=prepared.rollouts,
    )  # fmt: skip
    return RlRun(prepared, trainer, held_out)


@dataclass
class GroupUpdate:
    """The optimizer steps on one batch of groups."""

    config: GrpoConfig
    of: Prepared
    learner: Learner
    objective: PolicyObjective

    def __call__(self, rollout: Rollout) -> dict[str, Any]:
        """Advantages, rows, and a step on each share of them; returns metrics."""
        policy, loop, engine = self.config.policy, self.config.loop, self.of.tuned.engine
        rows = self.rows(rollout)
        each = -(-len(rows) // policy.updates) if rows else 1
        shares = [rows[i : i + each] for i in range(0, len(rows), each)]
        shares = [self._completed(share, several=len(shares) * policy.passes > 1) for share in shares]
        found: list[dict[str, Any]] = []
        for _ in range(policy.passes):
            for share in shares:
                batches = [batch for _, batch in dealt(share, loop.micro_rows, engine, self.of.pad)]
                found.append(self.learner.step(batches))
                most = self.config.rollout.mismatch_stop
                check_mismatch(found[-1]["mismatch"], most, self.objective.worst, self.of, rollout.behind)
        metrics = {**self._summary(found), **rollout.metrics}
        warn_of(metrics)
        return metrics

    def advantages(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """[G, K], by the estimator that the settings name."""
        kind = self.config.advantage
        if kind == "rloo":
            return leave_one_out(rewards, mask)
        if kind == "reinforce++":
            return batch_normalised(rewards, mask)
        return group_normalised(rewards, mask, deviation=kind == "group")

    def rows(self, rollout: Rollout) -> list[Row]:
        """A row for each group that teaches something, of its answers that count."""
        rewards, policy = rollout.rewards, self.config.policy
        if policy.kl and policy.kl_in == "reward":
            rewards = rewards - policy.kl * self._divergence(rollout)
        advantages = self.advantages(rewards, rollout.mask)
        teaches = varied(rewards, rollout.mask)
        rows = []
        for g, group in enumerate(rollout.groups):
            if not teaches[g]:
                continue
            kept = [k for k in range(len(group.answers)) if rollout.mask[g, k]]
            prompt, answers = self.of.prompts[group.prompt].ids, [group.answers[k] for k in kept]
            each = advantages[g, kept].tolist()
            rows.append(group_row(prompt, answers, each, policy.normalise, self.config.rollout.own_tokens))
        return rows

    def _completed(self, share: list[Row], several: bool) -> list[Row]:
        """With log-probabilities before the first update, where there are several, and the reference's."""
        policy, loop, engine = self.config.policy, self.config.loop, self.of.tuned.engine
        function = logprobs_of(self.config.rollout.temperature)
        if several:
            old = evaluated(share, loop.micro_rows, engine, self.of.pad, function)
            share = [with_extra(row, "old", values) for row, values in zip(share, old, strict=True)]
        if policy.kl and policy.kl_in == "loss":
            with self.of.reference.acting():
                values = evaluated(share, loop.micro_rows, engine, self.of.pad, function)
            share = [with_extra(row, "reference", each) for row, each in zip(share, values, strict=True)]
        return share

    def _divergence(self, rollout: Rollout) -> Tensor:
        """The estimate of each answer's divergence from the reference, summed over its tokens, [G, K]."""
        rows = [
            group_row(self.of.prompts[group.prompt].ids, group.answers, [0.0] * len(group.answers))
            for group in rollout.groups
        ]
        with self.of.reference.acting():
            function = logprobs_of(self.config.rollout.temperature)
            reference = evaluated(rows, self.config.loop.micro_rows, self.of.tuned.engine, self.of.pad, function)
        found = torch.zeros(rollout.rewards.shape)
        for g, (row, theirs) in enumerate(zip(rows, reference, strict=True)):
            sampled = torch.from_numpy(row.token_extras["sampled"])
            each = kl_estimate(sampled, torch.from_numpy(theirs), self.config.policy.kl_kind)
            parts = (each * torch.from_numpy(row.token_extras["mask"])).split(row.lengths.tolist())
            found[g] = torch.stack([part.sum() for part in parts[-found.shape[1] :]])
        return found

    def _summary(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """The mean over the optimizer steps, but for counters; without a step the weights are as they were."""
        if not found:
            return unchanged(self.learner)
        mean = {name: sum(x[name] for x in found) / len(found) for name in found[-1]}
        return mean | {name: found[-1][name] for name in ("tokens", "trained_tokens", "skipped", "lr")}
