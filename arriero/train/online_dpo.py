"""Direct preference optimisation on a model's own answers: the recipe behind `arriero dpo online`.

In each step the current policy answers every prompt several times, a reward scores the answers, and the best and the
worst of each prompt are a pair for the losses of `arriero dpo` (online DPO, arXiv 2402.04792, with a reward in the
judge's place; the best of K against the worst as in 2401.10020). The pairs are always of answers that the model gives
now, so what is learned does not run out as a fixed data set does. Sampling, scoring and the journal are those of
`arriero grpo` (rollouts.py): a run killed anywhere goes on to the same bits.

The reference is the model as it was before the run: asked in each step, with a new adapter switched off, or swapped in.
Prompts whose answers all have one reward are in no pair, and answers that were cut in none by `truncated = mask`.
Price of a step: sampling, a forward of the reference, and a step on two answers a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from arriero.data.batch import IGNORED, Batch, Extras, Row
from arriero.distributed.mesh import Mesh
from arriero.rewards.base import Scorer
from arriero.train.learner import Learner
from arriero.train.loop import Outcome, Trainer
from arriero.train.policy import dealt
from arriero.train.preference_config import REFERENCE_FREE, OnlineDpoConfig
from arriero.train.preference_objective import preference_objective
from arriero.train.recipe import alone, execute
from arriero.train.reference import document_logprobs
from arriero.train.rl import HeldOutAnswers, Prepared, RlRun, open_rewards, prepare, unchanged, warn_of
from arriero.train.rollouts import Rollout, Sampled


def main(config: OnlineDpoConfig) -> Outcome:
    """Train as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    with open_rewards(config) as scorer:
        return execute(config, "online_dpo", lambda c, console, mesh: build(c, console, mesh, scorer))


def build(config: OnlineDpoConfig, console: Console, mesh: Mesh | None = None, scorer: Scorer | None = None) -> RlRun:
    """Everything up to step 1."""
    scorer = scorer or open_rewards(config)
    prepared = prepare(config, console, mesh or alone(), scorer)
    learner = prepared.tuned.learner(preference_objective(config), prepared.steps)
    held_out = HeldOutAnswers(prepared)
    trainer = Trainer(
        learner, prepared.rollouts, prepared.steps, config.loop, Path(config.out),
        None if prepared.held_out is None else held_out, prepared.tuned.sidecars,
        update=PairUpdate(config, prepared, learner), journal=prepared.rollouts,
    )  # fmt: skip
    return RlRun(prepared, trainer, held_out)


@dataclass
class PairUpdate:
    """The optimizer step on the pairs of one batch of answers."""

    config: OnlineDpoConfig
    of: Prepared
    learner: Learner

    def __call__(self, rollout: Rollout) -> dict[str, Any]:
        """Pairs, what the reference says of them, and a step; returns metrics."""
        rows, gap = self.rows(rollout)
        told = {**rollout.metrics, "pairs": float(len(rows)), "reward_gap": gap}
        if not rows:
            return {**unchanged(self.learner), **told}
        engine = self.of.tuned.engine
        batches = [batch for _, batch in dealt(rows, self.config.loop.micro_rows, engine, self.of.pad)]
        if self.config.loss not in REFERENCE_FREE:
            batches = self._with_reference(batches)
        metrics = {**self.learner.step(batches), **told}
        warn_of(metrics)
        return metrics

    def rows(self, rollout: Rollout) -> tuple[list[Row], float]:
        """A row for each prompt with a best and a worst answer, and how far apart these are in the mean."""
        format_ids = self.of.tuned.base.tokenizer.special_ids.values() if self.config.mask_format else ()
        rows: list[Row] = []
        gaps: list[float] = []
        for rewards, mask, group in zip(rollout.rewards, rollout.mask, rollout.groups, strict=True):
            counted = mask.nonzero().flatten().tolist()
            best, worst = (pick(counted, key=lambda k: float(rewards[k]), default=-1) for pick in (max, min))
            if best < 0 or rewards[best] == rewards[worst]:
                continue
            prompt, gap = self.of.prompts[group.prompt].ids, float(rewards[best] - rewards[worst])
            rows.append(pair_row(prompt, group.answers[best], group.answers[worst], len(rows) + 1, format_ids))
            gaps.append(gap)
        return rows, sum(gaps) / max(len(gaps), 1)

    def _with_reference(self, batches: list[Batch]) -> list[Batch]:
        with self.of.reference.acting():
            found = document_logprobs(self.of.tuned.engine, batches)
        return [
            dataclasses.replace(batch, document_extras={**batch.document_extras, "reference": values})
            for batch, values in zip(batches, found, strict=True)
        ]


def pair_row(
    prompt: Sequence[int], better: Sampled, worse: Sampled, number: int, format_ids: Collection[int] = ()
) -> Row:
    """Two answers behind their prompt, as `PreferenceLoader.group` lays them. number: of the pair in its step, from 1.

    What is learned from are the sampled ids, terminator included. format_ids: tokens that do not count.
    """
    lead, last = list(prompt[:-1]), prompt[-1]
    tokens, targets, lengths = list(lead), [IGNORED] * len(lead), [len(lead)] if lead else []
    for answer in (better, worse):
        tokens += [last, *answer.ids[:-1]]
        targets += answer.targets
        lengths.append(len(answer.ids))
    at = np.asarray(targets, np.int64)
    scored = (at != IGNORED) & ~np.isin(at, list(format_ids))
    pad = [0] if lead else []
    of_documents: Extras = {
        "group": np.array([*pad, number, number], np.int64),
        "value": np.array([*pad, 1, 0], np.float32),
        "margin": np.zeros(len(lengths), np.float32),
        "best": np.array([*pad, 1, 0], np.bool_),
        "reference": np.zeros(len(lengths), np.float32),
    }
    return Row(
        np.asarray(tokens, np.int32), at, np.asarray(lengths, np.int64), (-1, 0, 0) if lead else (-1, -1),
        {"scored": scored.astype(np.float32)}, of_documents,
    )  # fmt: skip
