"""On-policy distillation: the recipe behind `arriero distill on-policy`.

A student that learns from a teacher's texts is never shown what to do after its own mistakes. Here it answers the
prompts itself, and at every token of its answers its distribution is drawn to the teacher's (GKD, arXiv 2306.13649,
with all data on-policy; reverse KL there is MiniLLM's, 2306.08543, without its variance reduction). No gradient goes
through the sampling. Where a fixed set of good answers is at hand, `arriero distill` learns from those first.

The teacher is in memory beside the student and reads the very batches that the student learns from, so nothing of its
distribution is left out: the divergence is over the whole vocabulary, or, with `top_k`, over the teacher's most
probable tokens and all others as one. Sampling and the journal are those of `arriero grpo` (rollouts.py). The
validation's loss is the divergence on answers to held-out prompts.
Price of a step: sampling, a forward of the teacher, and a step of the student; both heads' logits, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from arriero.checkpoint.load import load_model
from arriero.data.batch import IGNORED, Batch, Row
from arriero.distributed.mesh import Mesh
from arriero.distributed.objective import Objective
from arriero.errors import ConfigError
from arriero.losses.distillation import chunked_divergence
from arriero.model.llama import Llama
from arriero.rewards.base import Answer, Score, Scorer
from arriero.train.learner import Learner
from arriero.train.loop import Outcome, Trainer
from arriero.train.policy import dealt, evaluated, group_row
from arriero.train.recipe import DTYPES, alone, execute
from arriero.train.rl import HeldOutAnswers, Prepared, RlRun, open_rewards, prepare, unchanged, warn_of
from arriero.train.rl_config import OnPolicyDistillConfig
from arriero.train.rollouts import Group, Rollout
from arriero.train.teacher import check_same_ids, resolve_teacher

OF_REWARDS = ("reward", "same_reward")  # metrics that say nothing where nothing is rewarded


class Unscored(Scorer):
    """For answers that nobody rates: 0 each."""

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return [Score(0.0) for _ in answers]


def scorer_of(config: OnPolicyDistillConfig) -> Scorer:
    """What the answers are worth, where that is to be watched."""
    return open_rewards(config) if config.rewarded else Unscored()


def main(config: OnPolicyDistillConfig) -> Outcome:
    """Distil as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    with scorer_of(config) as scorer:
        return execute(config, "on_policy_distill", lambda c, console, mesh: build(c, console, mesh, scorer))


def build(
    config: OnPolicyDistillConfig, console: Console, mesh: Mesh | None = None, scorer: Scorer | None = None
) -> RlRun:
    """Everything up to step 1."""
    prepared = prepare(config, console, mesh or alone(), scorer or scorer_of(config))
    lesson = Lesson(config, open_teacher(config, prepared))
    learner = prepared.tuned.learner(lesson.objective, prepared.steps)
    held_out = HeldOutDivergence(prepared, lesson=lesson)
    trainer = Trainer(
        learner, prepared.rollouts, prepared.steps, config.loop, Path(config.out),
        None if prepared.held_out is None else held_out, prepared.tuned.sidecars,
        update=StudentUpdate(config, prepared, learner), journal=prepared.rollouts,
    )  # fmt: skip
    return RlRun(prepared, trainer, held_out)


def open_teacher(config: OnPolicyDistillConfig, of: Prepared) -> Llama:
    """The teacher, to be asked alone, in the type that the student computes in.

    Raises `ConfigError` where it has other tokens than the student, or is too short for its answers.
    """
    path = resolve_teacher(config.teacher)
    check_same_ids(config.teacher, path, of.tuned.base.tokenizer)
    model = load_model(path, dtype=DTYPES[config.loop.precision])
    theirs, ours = model.config.vocab_size, of.tuned.base.model.config.vocab_size
    if theirs != ours:
        raise ConfigError(
            f"teacher {config.teacher}: it has {theirs:,} tokens and the model {ours:,}; whole distributions are "
            "compared: bring one to the other's size (arriero tokenizer extend), or take arriero distill"
        )
    model.config.check_length(of.prompts.longest + config.rollout.longest)
    return model.to(of.tuned.engine.mesh.device).eval().requires_grad_(False)


@dataclass
class Lesson:
    """How far a student is from its teacher on a batch of its own answers."""

    config: OnPolicyDistillConfig
    teacher: Llama

    @property
    def objective(self) -> Objective:
        """The divergence a token, in nats."""
        return Objective(
            lambda model, batch: {"loss": self._compared(model, batch)[0]},
            lambda batch: {"loss": float(batch.token_extras["mask"].sum())},
        )

    def of_tokens(self, model: Llama, batch: Batch) -> Tensor:
        """The divergence at each token, [1, N], 0 where the student chose none; for `evaluated`."""
        return self._compared(model, batch)[1][None]

    def _compared(self, model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = model.model(batch.tokens, batch.layout).flatten(0, 1)
        with torch.no_grad():
            theirs = self.teacher.model(batch.tokens, batch.layout).flatten(0, 1)
        targets = batch.targets.flatten().masked_fill(batch.token_extras["mask"][0] == 0, IGNORED)
        heads = model.head.weight, self.teacher.head.weight
        return chunked_divergence(hidden, theirs, *heads, targets, self.config.divergence, self.config.top_k)


def rows_of(of: Prepared, prompts: Any, groups: Sequence[Group], mask: Tensor | None = None) -> list[Row]:
    """A row for each prompt, of its answers that count."""
    rows = []
    for g, group in enumerate(groups):
        answers = [a for k, a in enumerate(group.answers) if mask is None or mask[g, k]]
        if answers:
            rows.append(group_row(prompts[group.prompt].ids, answers, [0.0] * len(answers)))
    return rows


@dataclass
class StudentUpdate:
    """The optimizer step on one batch of answers."""

    config: OnPolicyDistillConfig
    of: Prepared
    learner: Learner

    def __call__(self, rollout: Rollout) -> dict[str, Any]:
        """A step on all answers that count; returns metrics."""
        rows = rows_of(self.of, self.of.prompts, rollout.groups, rollout.mask)
        told = {name: x for name, x in rollout.metrics.items() if self.config.rewarded or name not in OF_REWARDS}
        if not rows:
            return {**unchanged(self.learner), **told}
        batches = [b for _, b in dealt(rows, self.config.loop.micro_rows, self.of.tuned.engine, self.of.pad)]
        metrics = {**self.learner.step(batches), **told}
        warn_of({name: x for name, x in metrics.items() if name not in OF_REWARDS})
        return metrics


@dataclass
class HeldOutDivergence(HeldOutAnswers):
    """Answers to held-out prompts: how far the student is from its teacher there."""

    lesson: Lesson = field(kw_only=True)

    def __call__(self) -> dict[str, Any]:
        """As `HeldOutAnswers`, with the divergence a token as the loss; rewards where they are watched."""
        found = super().__call__()
        if "divergence" not in found:
            of, engine = self.of, self.of.tuned.engine
            rows = rows_of(of, of.held_out, self.groups)
            values = evaluated(rows, of.config.loop.micro_rows, engine, of.pad, self.lesson.of_tokens)
            tokens = sum(float(row.token_extras["mask"].sum()) for row in rows)
            found["loss"] = found["divergence"] = float(sum(value.sum() for value in values)) / tokens
            if not self.lesson.config.rewarded:
                found["samples"] = [text.rsplit("  [reward", 1)[0] for text in found["samples"]]
                for name in [name for name in found if name.startswith(("reward", "best_of_"))]:
                    del found[name]
        return found
