"""One batch of PPO: rewards by token, advantages and returns, and the optimizer steps of policy and value on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.data.batch import Batch, Row
from arriero.losses.advantages import gae, whitened
from arriero.losses.policy import kl_estimate
from arriero.model.llama import Llama
from arriero.train.learner import Learner
from arriero.train.policy import PolicyObjective, dealt, evaluated, group_row, logprobs_of, with_extra
from arriero.train.rl import Prepared, check_mismatch, warn_of
from arriero.train.rl_config import PpoConfig
from arriero.train.rollouts import Rollout


def values_of(model: Llama, batch: Batch) -> Tensor:
    """The value before each token, fp32 [1, N]."""
    hidden = model.model(batch.tokens, batch.layout).float()
    return F.linear(hidden, model.head.weight.float())[..., 0]


@dataclass
class PpoUpdate:
    """The optimizer steps of policy and value on one batch of answers."""

    config: PpoConfig
    of: Prepared
    policy: Learner
    value: Learner
    objective: PolicyObjective

    def __call__(self, rollout: Rollout) -> dict[str, Any]:
        """Log-probabilities and values before the updates, advantages, and a step of both on each share of the rows."""
        config, loop = self.config, self.config.loop
        rows, told = self.rows(rollout)
        found: list[dict[str, Any]] = []
        for _ in range(config.policy.passes):
            for share in self._shares(rows):
                batches = [batch for _, batch in dealt(share, loop.micro_rows, self.of.tuned.engine, self.of.pad)]
                of_value = {f"value/{name}": x for name, x in self.value.step(batches).items()}
                if rollout.step < config.value.warmup_steps:
                    found.append({"loss": 0.0, "lr": 0.0, "grad_norm": 0.0, **self._counters, **of_value})
                    continue
                found.append({**self.policy.step(batches), **of_value})
                check_mismatch(
                    found[-1]["mismatch"], config.rollout.mismatch_stop, self.objective.worst, self.of, rollout.behind
                )
        metrics = {**self._summary(found), **told, **rollout.metrics}
        warn_of(metrics)
        return metrics

    def rows(self, rollout: Rollout) -> tuple[list[Row], dict[str, float]]:
        """A row for each prompt, of its answers that count, with advantages, returns, and what was before updates."""
        config, of, n = self.config, self.of, rollout.rewards.shape[1]
        scores = whitened(rollout.rewards, rollout.mask) if config.value.whiten_scores else rollout.rewards
        rows = []
        for g, group in enumerate(rollout.groups):
            kept = [k for k in range(n) if rollout.mask[g, k]]
            if kept:
                answers = [group.answers[k] for k in kept]
                prompt = of.prompts[group.prompt].ids
                each = [a.rewards_with(float(scores[g, k])) for a, k in zip(answers, kept, strict=True)]
                normalise, longest = config.policy.normalise, config.rollout.own_tokens
                rows.append(group_row(prompt, answers, [0.0] * len(kept), normalise, longest, rewards=each))
        if not rows:
            return [], {}
        rows = self._before(rows)
        kl = 0.0
        advantages, returns = [], []
        for row in rows:
            rewards, penalty = self._token_rewards(row)
            kl += float(penalty.sum())
            values, mask = (torch.from_numpy(row.token_extras[name]) for name in ("values", "mask"))
            documents = torch.repeat_interleave(torch.arange(len(row.lengths)), torch.from_numpy(row.lengths))
            a, r = gae(rewards, values, mask, documents, config.value.gamma, config.value.gae_lambda)
            advantages.append(a)
            returns.append(r)
        masks = torch.cat([torch.from_numpy(row.token_extras["mask"]) for row in rows])
        told = self._told(rows, torch.cat(returns), masks, kl)
        if config.value.whiten_advantages:
            advantages = list(whitened(torch.cat(advantages), masks).split([len(row.tokens) for row in rows]))
        for i, (a, r) in enumerate(zip(advantages, returns, strict=True)):
            rows[i] = with_extra(with_extra(rows[i], "advantages", a.numpy()), "returns", r.numpy())
        return rows, told

    def _shares(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of each update."""
        each = max(1, -(-len(rows) // self.config.policy.updates))
        return [rows[i : i + each] for i in range(0, len(rows), each)]

    def _before(self, rows: list[Row]) -> list[Row]:
        """With log-probabilities and values before the updates, and the reference's log-probabilities.

        In the batches that the updates will take, so that the first ratio is exactly 1.
        """
        config, of, engine = self.config, self.of, self.of.tuned.engine
        micro_rows, function = config.loop.micro_rows, logprobs_of(config.rollout.temperature)
        found: list[Row] = []
        for share in self._shares(rows):
            values = {"old": evaluated(share, micro_rows, engine, of.pad, function)}
            values["values"] = evaluated(share, micro_rows, self.value.engine, of.pad, values_of)
            if config.policy.kl:
                with of.reference.acting():
                    values["reference"] = evaluated(share, micro_rows, engine, of.pad, function)
            for k, row in enumerate(share):
                for name, of_rows in values.items():
                    row = with_extra(row, name, of_rows[k])
                found.append(row)
        return found

    def _token_rewards(self, row: Row) -> tuple[Tensor, Tensor]:
        """Of each token [N]: an answer's score at its last one, less the weighted divergence; and the divergence."""
        policy, extras = self.config.policy, {n: torch.from_numpy(x) for n, x in row.token_extras.items()}
        penalty = torch.zeros(len(row.tokens))
        if policy.kl:
            penalty = extras["mask"] * kl_estimate(extras["old"], extras["reference"], policy.kl_kind)
        rewards = extras["rewards"]
        return (rewards - policy.kl * penalty if policy.kl_in == "reward" else rewards), penalty

    def _told(self, rows: list[Row], returns: Tensor, masks: Tensor, kl: float) -> dict[str, float]:
        """Metrics of the batch: divergence a token, and the share of the returns' variance that the values explain."""
        values = torch.cat([torch.from_numpy(row.token_extras["values"]) for row in rows])[masks > 0]
        wanted = returns[masks > 0]
        explained = 1 - float((wanted - values).var() / wanted.var().clamp(min=1e-8)) if len(wanted) > 1 else 0.0
        told = {"explained_variance": explained}
        return told | ({"kl_from_start": kl / float(masks.sum())} if self.config.policy.kl else {})

    @property
    def _counters(self) -> dict[str, Any]:
        c = self.policy.counters
        return {"tokens": c.tokens, "trained_tokens": c.trained_tokens, "skipped": c.skipped + c.spikes}

    def _summary(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """The mean over the optimizer steps, but for counters."""
        if not found:
            return {"loss": 0.0, "lr": 0.0, "grad_norm": 0.0, **self._counters}
        mean = {name: sum(x[name] for x in found) / len(found) for name in found[-1]}
        last = ("tokens", "trained_tokens", "skipped", "lr", "value/tokens", "value/trained_tokens", "value/skipped")
        return mean | {name: found[-1][name] for name in last}
