"""Runs that learn from their own answers: a scorer by a rule, and runs that are killed in the middle of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from arriero.rewards.base import Answer, Score, Scorer
from arriero.train.rl import RlRun


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
