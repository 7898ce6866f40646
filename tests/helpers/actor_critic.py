"""A recipe of two learners, whose batches the policy makes itself: what a PPO run stands on, at toy size.

The policy answers prompts of 3 tokens with 5 of its own, sampled; the reward is the share of them that are their
predecessor plus one. Value and policy learn from the new answers and, once more, from those of the step before, which
are journaled with a running mean of the rewards. `python -m helpers.actor_critic RUN_DIR STEPS` is one process of a
run, alone or under torchrun; it resumes by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.data.batch import IGNORED, Batch, Row, collate, next_token_targets, shifted
from arriero.distributed.config import ParallelConfig
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh, init_mesh
from arriero.distributed.objective import Objective
from arriero.distributed.parallelize import parallelize
from arriero.losses.lm import token_logprobs
from arriero.model.build import empty_model
from arriero.model.config import LlamaConfig
from arriero.model.initial import initial_weight
from arriero.model.llama import Llama
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.learner import Learner
from arriero.train.loop import Trainer
from arriero.train.metrics import MetricsLog, NoLog
from arriero.train.validation import HeldOut, Validation

POLICY = LlamaConfig(22, 2, 6, 2, 34, 31, 64, head_dim=10)
VALUE = LlamaConfig(26, 1, 2, 2, 38, 31, 64, head_dim=6)
ANSWERS, PROMPT, NEW = 12, 3, 5  # of a step; tokens of each


def policy_loss(model: Llama, batch: Batch) -> dict[str, Tensor]:
    """-sum of min(r A, clip(r) A) over the answers' tokens, r the ratio to the probability they were sampled with."""
    log_p = logprobs(model, batch)[0]
    advantage, old = (batch.token_extras[name].flatten() for name in ("advantage", "old"))
    ratio = torch.where(batch.targets.flatten() == IGNORED, 1, (log_p - old).exp())
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return {"loss": -gain.sum(), "kl": (old - log_p).detach().sum()}


def value_loss(model: Llama, batch: Batch) -> dict[str, Tensor]:
    """Sum of squared errors of the value at the answers' tokens."""
    trained = batch.targets != IGNORED
    return {"loss": ((values(model, batch) - batch.token_extras["reward"]).square() * trained).sum()}


def logprobs(model: Llama, batch: Batch) -> Tensor:
    hidden = model.model(batch.tokens, batch.layout)
    return token_logprobs(hidden.flatten(0, 1), model.head.weight, batch.targets.flatten()).chosen[None]


def values(model: Llama, batch: Batch) -> Tensor:
    return model(batch.tokens, batch.layout)[..., 0].float()


def sampled(model: Llama, batch: Batch) -> Tensor:
    """The token that would follow each position; "noise" is of Gumbel's distribution."""
    logits = model(batch.tokens, batch.layout).float()
    return (logits + batch.token_extras["noise"]).argmax(-1).float()


def rewards(answers: np.ndarray) -> np.ndarray:
    """answers [n, PROMPT + NEW] -> [n]."""
    follows = (np.diff(answers, axis=1) % POLICY.vocab_size == 1)[:, PROMPT - 1 :]
    return follows.mean(axis=1).astype(np.float32)


class Rollouts:
    """The source and its journal: this process's share of the answers of a step, and of the step before's."""

    def __init__(self, policy: Learner, value: Learner) -> None:
        self.policy, self.value, self.mesh = policy, value, policy.engine.mesh
        self.mine = self.mesh.local_shard(ANSWERS)
        self.before: list[Row] = []
        self.mean, self.last_reward = 0.0, 0.0

    def __call__(self, step: int) -> list[Batch]:
        with self.policy.evaluating(), self.value.evaluating():
            new = self._scored(self._answers(step))
        batches = [collate(rows) for rows in (new, self.before) if rows]
        self.before = new
        return batches

    def _answers(self, step: int) -> np.ndarray:
        random = [np.random.default_rng([7, step, i]) for i in self.mine]
        tokens = np.stack([rng.integers(0, POLICY.vocab_size, PROMPT) for rng in random]).astype(np.int32)
        for _ in range(NEW):
            n = tokens.shape[1]
            noise = [np.tile(rng.gumbel(size=(1, POLICY.vocab_size)).astype(np.float32), (n, 1)) for rng in random]
            rows = [
                Row(row, np.full(n, IGNORED), np.array([n]), token_extras={"noise": z})
                for row, z in zip(tokens, noise, strict=True)
            ]
            (following,) = self.policy.engine.evaluate([collate(rows)], sampled)
            last = following[0].view(len(rows), n)[:, -1:]
            tokens = np.concatenate([tokens, last.numpy().astype(np.int32)], axis=1)
        return tokens

    def _scored(self, answers: np.ndarray) -> list[Row]:
        trained = np.arange(PROMPT + NEW) >= PROMPT
        targets = [next_token_targets(row, trained) for row in answers]
        lengths = np.array([PROMPT + NEW])
        plain = collate([Row(row, target, lengths) for row, target in zip(answers, targets, strict=True)])
        (old,) = self.policy.engine.evaluate([plain], logprobs)
        (value,) = self.value.engine.evaluate([plain], values)
        reward = rewards(answers)
        n, total = self.mesh.count(len(answers), float(reward.sum()))
        self.last_reward = total / n
        self.mean = 0.9 * self.mean + 0.1 * self.last_reward
        rows = []
        for i, (old_row, value_row) in enumerate(zip(old[0].split(8), value[0].split(8), strict=True)):
            of_tokens = np.full(PROMPT + NEW, reward[i])
            advantage = of_tokens - 0.5 * (value_row.numpy() + np.float32(self.mean))
            extras = {"old": old_row.numpy(), "reward": of_tokens, "advantage": shifted(advantage, 0.0)}
            rows.append(Row(answers[i], targets[i], lengths, token_extras=extras))
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """The answers of the last step, each under its number in the whole run's batch."""
        found = {}
        for i, row in zip(self.mine, self.before, strict=False):
            found |= {f"{i}/tokens": torch.from_numpy(row.tokens), f"{i}/targets": torch.from_numpy(row.targets)}
            found |= {f"{i}/{name}": torch.from_numpy(x) for name, x in row.token_extras.items()}
        return found

    def state(self) -> dict[str, Any]:
        """The running mean of the rewards."""
        return {"mean": self.mean}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take up both."""
        self.mean = state["mean"]
        self.before = []
        for i in self.mine:
            extras = {name: tensors[f"{i}/{name}"].numpy() for name in ("old", "reward", "advantage")}
            tokens, targets = (tensors[f"{i}/{name}"].numpy() for name in ("tokens", "targets"))
            self.before.append(Row(tokens, targets, np.array([PROMPT + NEW]), token_extras=extras))


def make_trainer(run_dir: Path, steps: int, mesh: Mesh) -> Trainer:
    """The recipe: two learners with an optimizer and a schedule each; two policy steps to each of the value's."""

    def engine(shape: LlamaConfig, head: Any, seed: int) -> Engine:
        drawn = partial(initial_weight, std=0.1, seed=seed)
        return Engine(parallelize(empty_model(shape, head).train(), mesh, values=drawn), mesh)

    def counts(batch: Batch) -> dict[str, float]:
        return {"loss": batch.n_trained}

    policy = Learner(
        engine(POLICY, "logits", 1),
        Objective(policy_loss, lambda batch: {"loss": batch.n_trained, "kl": batch.n_trained}),
        OptimConfig(lr=1e-2, schedule="cosine"),
        2 * steps,
        average=0.3,
    )
    value = Learner(
        engine(VALUE, "value", 2), Objective(value_loss, counts), OptimConfig("muon", 3e-3, schedule="constant"), steps
    )
    rollouts = Rollouts(policy, value)

    def update(batches: list[Batch]) -> dict[str, Any]:
        of_value, _ = value.step(batches), policy.step(batches)
        return {
            **policy.step(batches),
            **{f"value/{name}": x for name, x in of_value.items()},
            "reward": rollouts.last_reward,
        }

    counting = (np.arange(20) % POLICY.vocab_size).astype(np.int32)
    held_out = Row(counting, next_token_targets(counting, np.full(20, True)), np.array([20]))
    validate = Validation(policy.engine, {"counting": HeldOut(lambda _: collate([held_out]), 1)})
    loop = LoopConfig(batch_rows=ANSWERS, validate_every=2, save_every=3, keep_last=3)
    learners = {"policy": policy, "value": value}
    return Trainer(learners, rollouts, steps, loop, run_dir, validate, update=update, journal=rollouts)


def run(trainer: Trainer, mesh: Mesh) -> None:
    """From the newest checkpoint, if there is one, to the end."""
    if (saved := trainer.checkpoints.latest()) is not None:
        trainer.restore(saved)
    after = trainer.progress.step
    with MetricsLog(trainer.run_dir, after=after) if mesh.rank == 0 else NoLog() as log:
        outcome = trainer.run(log)
    if mesh.rank == 0:
        print("ended", outcome.progress.step, "begun at", after, flush=True)


def main(run_dir: str, steps: str) -> None:
    """One process."""
    mesh = init_mesh(ParallelConfig(timeout=120), "cpu") if "RANK" in os.environ else Mesh.alone("cpu")
    pids = Path(run_dir) / "pids"
    pids.mkdir(parents=True, exist_ok=True)
    (pids / f"{mesh.rank}.{os.getpid()}").touch()
    run(make_trainer(Path(run_dir), int(steps), mesh), mesh)
    mesh.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
