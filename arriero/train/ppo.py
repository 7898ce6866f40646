"""Proximal policy optimisation with a value model: the recipe behind `arriero ppo`.

As InstructGPT and Llama 2 had it (arXiv 2203.02155, section 3.5; 2307.09288, section 3.2.3): the reward of an answer
stands at its last token (of an episode, each answer's at its own), the divergence from the reference is taken off at
each, a value model says what is to come, and generalised advantage estimation (1506.02438) makes advantages of these.
Policy and value are two learners of one run. In a run of one process both, and the reference, are one frozen base in
memory, with an adapter each and a value head; what LoRA leaves out, or several processes shard, each has for itself.

Price, beside GRPO's: the value model's forward and backward, and a forward of the reference.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from torch import Tensor

from arriero.data.batch import Batch
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh
from arriero.distributed.objective import Objective
from arriero.losses.policy import value_loss
from arriero.model.llama import Llama
from arriero.model.lora import plain_name
from arriero.rewards.base import Scorer
from arriero.train.loop import Outcome, Trainer
from arriero.train.policy import PolicyObjective
from arriero.train.ppo_update import PpoUpdate, values_of
from arriero.train.recipe import alone, execute
from arriero.train.rl import HeldOutAnswers, RlRun, open_rewards, prepare
from arriero.train.rl_config import PpoConfig
from arriero.train.tuned import open_base


def main(config: PpoConfig) -> Outcome:
    """Train as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    with open_rewards(config) as scorer:
        return execute(config, "ppo", lambda c, console, mesh: build(c, console, mesh, scorer))


def build(config: PpoConfig, console: Console, mesh: Mesh | None = None, scorer: Scorer | None = None) -> RlRun:
    """Everything up to step 1."""
    scorer, mesh, of_value = scorer or open_rewards(config), mesh or alone(), config.value
    prepared = prepare(config, console, mesh, scorer)
    optim = dataclasses.replace(config.optim, lr=of_value.value_lr or 5 * config.optim.lr)
    longest = config.data.max_prompt + config.rollout.longest
    base = open_base(dataclasses.replace(config, optim=optim, adapter=""), longest=longest, head="value")
    value_model = base.on(mesh, tokens=0)
    if not mesh.distributed:
        share_frozen(prepared.tuned.engine, value_model.engine)
    objective = PolicyObjective(config.policy, config.rollout.temperature)
    updates = prepared.steps * config.policy.updates * config.policy.passes
    policy = prepared.tuned.learner(objective(), updates)
    value = value_model.learner(value_objective(of_value.value_clip), updates)
    held_out = HeldOutAnswers(prepared)
    trainer = Trainer(
        {"policy": policy, "value": value}, prepared.rollouts, prepared.steps, config.loop, Path(config.out),
        None if prepared.held_out is None else held_out, prepared.tuned.sidecars,
        update=PpoUpdate(config, prepared, policy, value, objective), journal=prepared.rollouts,
    )  # fmt: skip
    return RlRun(prepared, trainer, held_out)


def share_frozen(one: Engine, other: Engine) -> None:
    """Let what is frozen in both lie in memory once."""
    kept = {plain_name(name): p for name, p in one.model.named_parameters() if not p.requires_grad}
    for name, p in other.model.named_parameters():
        same = kept.get(plain_name(name))
        if not p.requires_grad and same is not None and same.shape == p.shape and same.dtype == p.dtype:
            p.data = same.data
    buffers = dict(one.model.named_buffers())
    for name, b in other.model.named_buffers():
        if (mine := buffers.get(name)) is not None and mine.shape == b.shape and mine.dtype == b.dtype:
            b.data = mine.data


def value_objective(clip: float) -> Objective:
    """Half the squared error of the value at each token that the policy chose; see `losses.policy.value_loss`."""

    def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
        e = {name: x[0] for name, x in batch.token_extras.items()}
        return {"loss": (e["mask"] * value_loss(values_of(model, batch)[0], e["values"], e["returns"], clip)).sum()}

    return Objective(sums, lambda batch: {"loss": float(batch.token_extras["mask"].sum())})
