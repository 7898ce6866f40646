"""Runs that learn from their own answers: small ones, a scorer by a rule, and kills in the middle of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from arriero.rewards.base import Answer, Score, Scorer
from arriero.train import grpo
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.recipe import execute
from arriero.train.rl import RlRun
from arriero.train.rl_config import GrpoConfig, PolicyConfig, PromptConfig, RolloutConfig


class ByRule(Scorer):
    """The share of the letter e among an answer's characters, by a rule that anyone can repeat."""

    def __init__(self, rule: Callable[[str], float] = lambda text: text.count("e") / (len(text) or 1)) -> None:
        self.rule, self.seen = rule, 0

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        self.seen += len(answers)
        return [Score(self.rule(answer.text)) for answer in answers]


class Killed(Exception):
    pass


def killed_in(part: str, at: int) -> Callable[[RlRun], None]:
    """Make the third call of one part of a run fail, for good: in the middle of step 3."""

    def changed(run: RlRun) -> None:
        rollouts, calls = run.prepared.rollouts, itertools.count()
        owner: Any = {"sampled": rollouts, "scored": rollouts, "step": run.trainer.learner}[part]
        inner = getattr(owner, part)

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                raise Killed
            return inner(*args, **kwargs)

        setattr(owner, part, failing)

    return changed


def result(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def grpo_settings(toy_model: Path, prompts: Path, out: Path, steps: int = 5, **rollout: Any) -> GrpoConfig:
    """Of a small run that saves each step."""
    values: dict[str, Any] = {
        "answers": 5, "max_new_tokens": 7, "truncated": "score", "validation_answers": 2, "at_once": 16,
    }  # fmt: skip
    return GrpoConfig(
        model=str(toy_model),
        out=str(out),
        samples=2,
        rollout=RolloutConfig(**(values | rollout)),
        loop=LoopConfig(
            steps=steps, batch_rows=4, micro_rows=2, precision="fp32", save_every=1, validate_every=2, keep_last=9
        ),
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        policy=PolicyConfig(),  # one update on a batch
        data=PromptConfig(train=str(prompts), validation=str(prompts.parent / "held-out.jsonl")),
    )


def train_grpo(config: GrpoConfig, changed: Callable[[RlRun], None] = lambda run: None) -> None:
    """A run, scored by rule."""

    def build(c: GrpoConfig, console: Any, mesh: Any) -> RlRun:
        run = grpo.build(c, console, mesh, ByRule())
        changed(run)
        return run

    execute(config, "grpo", build)


def assert_equal_runs(one: Path, other: Path) -> None:
    """The same adapter and the same journal, to the byte."""
    a, b = result(one), result(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    journals = [sorted((run / "rollouts").iterdir()) for run in (one, other)]
    assert [p.name for p in journals[0]] == [p.name for p in journals[1]]
    assert [p.read_bytes() for p in journals[0]] == [p.read_bytes() for p in journals[1]]
