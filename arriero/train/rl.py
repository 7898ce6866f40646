"""What recipes share that learn from a model's own answers: prompts, sampler, rewards, held-out answers, and warnings.

`prepare` opens all of it; a recipe adds its learners and an `update` that takes a `Rollout` (rollouts.py) and has them
step (policy.py). The validation's loss is minus the mean reward of answers to held-out prompts, sampled as in training
with the same random numbers each time; the weights with the highest reward are the result. Where the reward is a proxy,
`validation_reward` names what it stands for, and the best weights are those of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from arriero.data.prompts import Prompts, read_split
from arriero.distributed.mesh import Mesh
from arriero.errors import TrainingError, check
from arriero.losses.policy import kl_estimate
from arriero.rewards.base import Answer, Score, Scorer
from arriero.rewards.environment import open_environment
from arriero.rewards.open import open_scorer
from arriero.show.terminal import warn_once
from arriero.tokenizer.chat import encode_reply
from arriero.train.episodes import Group
from arriero.train.learner import Learner, mixed
from arriero.train.loop import Trainer
from arriero.train.policy import PADDED_TO, Reference, Worst, evaluated, group_row, logprobs_of
from arriero.train.recipe import warmup_note
from arriero.train.rl_config import RlConfig
from arriero.train.rollouts import VALIDATION, Rollouts, begun
from arriero.train.sampler import Sampler
from arriero.train.samples import Sample, write_samples
from arriero.train.served_sampler import ServedSampler
from arriero.train.tuned import Tuned, open_base

KL_GROUPS = 16  # held-out prompts whose answers the divergence from the reference is measured on


@dataclass(frozen=True)
class Prepared:
    """Everything but the learners."""

    config: RlConfig
    tuned: Tuned
    prompts: Prompts
    held_out: Prompts | None
    rollouts: Rollouts
    reference: Reference
    steps: int

    @property
    def pad(self) -> bool:
        """Whether batches are filled up to common lengths."""
        return self.tuned.padded_to(PADDED_TO) is not None


class Rewards(Scorer):
    """A scorer of the steps' answers, and another of held-out ones."""

    def __init__(self, of_steps: Scorer, of_held_out: Scorer) -> None:
        self.of_steps, self.of_held_out = of_steps, of_held_out

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        return self.of_steps(answers)

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """What the steps' scorer says of a row."""
        self.of_steps.check(row, where)

    def close(self) -> None:
        """Close both."""
        self.of_steps.close()
        self.of_held_out.close()


def open_rewards(config: RlConfig) -> Scorer:
    """What scores the answers, or plays with them."""
    if config.rollout.environment:
        return open_environment(config.rollout.environment, config.rollout.turn_seconds)
    of_steps = open_scorer(config.scored_by)
    return Rewards(of_steps, open_scorer(config.validation_reward)) if config.validation_reward else of_steps


def prepare(config: RlConfig, console: Console, mesh: Mesh, scorer: Scorer) -> Prepared:
    """Open model, prompts, sampler: all that can be refused is refused here."""
    loop, data, rollout = config.loop, config.data, config.rollout
    mesh.config.check_batch(loop.batch_rows, loop.micro_rows, PADDED_TO)
    longest = data.max_prompt + rollout.longest
    base = open_base(config, longest=longest)
    prompts, held_out = read_split(
        data.train, data.validation, base.tokenizer,
        max_length=data.max_prompt, max_truncated=data.max_truncated, raw=data.raw, console=console,
    )  # fmt: skip
    for prompt in (*prompts, *(held_out or ())):
        scorer.check(prompt.fields, prompt.where)
    if isinstance(scorer, Rewards):
        for prompt in held_out or ():
            scorer.of_held_out.check(prompt.fields, prompt.where)
    if rollout.environment:
        encode_reply(base.tokenizer, prompts[0].messages, [{"role": "user", "content": "x"}], prompts[0].tools)
    held_out = None if held_out is None else held_out[: data.validation_prompts]
    steps = loop.steps or max(1, math.ceil(loop.epochs * len(prompts) / loop.batch_rows))
    # compiling pays where shapes repeat, and those of answers do not; between products the sampler rounds nothing
    tuned = base.on(mesh, tokens=0, residual=torch.float32)
    longest = max(each.longest for each in (prompts, held_out) if each is not None) + rollout.longest
    sampler = open_sampler(config, tuned, longest)
    rollouts = Rollouts(
        prompts, sampler, scorer, rollout,
        n_prompts=loop.batch_rows, seed=loop.seed, run_dir=Path(config.out), reward=config.scored_by,
        steps=steps,
    )  # fmt: skip
    reference = Reference(tuned.engine, switched=config.method == "lora" and not config.adapter)
    return Prepared(config, tuned, prompts, held_out, rollouts, reference, steps)


def open_sampler(config: RlConfig, tuned: Tuned, longest: int) -> Sampler:
    """The engine that answers, where the settings have it. longest: tokens of a prompt and its episode."""
    rollout = config.rollout
    if rollout.rollout == "here":
        return Sampler(tuned, longest=longest, at_once=rollout.at_once)
    world = tuned.engine.mesh.world
    check(
        world == 1, f"rollout is {rollout.rollout}, and {world} processes train; with several, answers are sampled here"
    )
    if rollout.rollout.startswith("http"):
        return ServedSampler(tuned, longest=longest, at_once=rollout.at_once)
    from arriero.train.ray_sampler import RaySampler  # here: ray is an extra

    return RaySampler(tuned, longest=longest, at_once=rollout.at_once)


# -- held-out answers --------------------------------------------------------------------------------------------------


@dataclass
class HeldOutAnswers:
    """Answers to held-out prompts: their rewards, and how far the policy has moved from its reference."""

    of: Prepared
    groups: list[Group] = field(default_factory=list)  # the last answers
    found: dict[str, Any] = field(default_factory=dict)  # what they came to
    weights: int = 0  # the checksum of those that answered

    def __call__(self) -> dict[str, Any]:
        """The loss (minus the mean reward), reward and its standard error, best of k, cut answers, KL, samples."""
        of, config = self.of, self.of.config.rollout
        assert of.held_out is not None
        chosen = list(range(len(of.held_out)))
        seeds = [mixed(of.config.loop.seed, VALIDATION, i) for i in chosen]
        weights = of.rollouts.sampler.current()
        if self.found and self.weights == weights.checksum:
            return self.found
        self.groups = groups = of.rollouts.answered(
            of.held_out, begun(chosen, seeds, config.validation_answers), weights
        )
        values = _values(groups)
        proxy = {}
        if isinstance(scorer := of.rollouts.scorer, Rewards):
            proxy = {"proxy": _mean(values)}
            unscored = [replace(g, answers=[replace(a, value=None) for a in g.answers]) for g in groups]
            self.groups = groups = of.rollouts.scored(of.held_out, unscored, scorer.of_held_out)
            values = _values(groups)
        reward = _mean(values)
        self.weights = weights.checksum
        self.found = {
            "loss": -reward,
            "reward": reward,
            "reward_error": _error([sum(each) / len(each) for each in values]),
            f"best_of_{config.validation_answers}": sum(map(max, values)) / len(values),
            **proxy,
            "truncated": _mean([[not a.finished for a in group.answers] for group in groups]),
            "answer_tokens": _mean([[sum(a.answers) for a in group.answers] for group in groups]),
            "kl": self._kl(groups[:KL_GROUPS]),
            "samples": [self._shown(group) for group in groups[: of.config.samples]],
        }
        return self.found

    def _kl(self, groups: list[Group]) -> float:
        """Mean of the k3 estimate over the answers' tokens."""
        of = self.of
        assert of.held_out is not None
        rows = [group_row(of.held_out[g.prompt].ids, g.answers, [0.0] * len(g.answers)) for g in groups]
        function = logprobs_of(of.config.rollout.temperature)
        micro_rows = of.config.loop.micro_rows
        policy = evaluated(rows, micro_rows, of.tuned.engine, of.pad, function)
        with of.reference.acting():
            reference = evaluated(rows, micro_rows, of.tuned.engine, of.pad, function)
        total = n = 0.0
        for row, ours, theirs in zip(rows, policy, reference, strict=True):
            k3 = kl_estimate(torch.from_numpy(ours), torch.from_numpy(theirs), "k3")
            total, n = total + float(k3.sum()), n + float(row.token_extras["mask"].sum())
        return total / max(n, 1.0)

    def _shown(self, group: Group) -> str:
        assert self.of.held_out is not None
        answer = group.answers[0]
        return f"{self.of.held_out[group.prompt].text}\n→ {answer.shown}  [reward {answer.value:g}]"

    def samples(self) -> list[Sample]:
        """The last answers, for samples.jsonl."""
        held_out = self.of.held_out
        if held_out is None or not self.of.config.samples:
            return []
        self()
        shown = self.groups[: self.of.config.samples]
        return [
            Sample(held_out[g.prompt].text, str(held_out[g.prompt].fields.get("answer", "")), g.answers[0].shown)
            for g in shown
        ]


@dataclass(frozen=True)
class RlRun:
    """Everything a run is made of, ready for step 1."""

    prepared: Prepared
    trainer: Trainer
    held_out: HeldOutAnswers

    @property
    def total_tokens(self) -> int:
        """Tokens through the model over the whole run, at most."""
        of, config = self.prepared, self.prepared.config
        group = of.prompts.longest + config.learned * config.rollout.longest
        return of.steps * config.loop.batch_rows * group * config.reads

    def summary(self) -> str:
        """What is about to happen, in a few lines."""
        of, config = self.prepared, self.prepared.config
        held_out = 0 if of.held_out is None else len(of.held_out)
        turns = f", {config.rollout.turns} turns" if config.rollout.environment else ""
        return (
            f"{of.tuned.summary()}\n"
            f"{len(of.prompts):,} prompts of at most {of.prompts.longest:,} tokens; {held_out:,} held out; "
            f"reward: {config.scored_by}\n"
            f"the sampler: {of.rollouts.sampler.summary}\n"
            f"{of.steps:,} steps of {config.loop.batch_rows} prompts x {config.rollout.answers} answers of at most "
            f"{config.rollout.max_new_tokens:,} tokens{turns} -> {config.out}" + warmup_note(config.optim, of.steps)
        )

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the prompts, training and validation."""
        of = self.prepared
        both = {"training prompts": of.prompts, "validation prompts": of.held_out}
        return {f"the {name}": x.fingerprint for name, x in both.items() if x is not None} | of.tuned.fingerprints()

    def data_statistics(self) -> dict[str, Any]:
        """What is asked, and how much."""
        of = self.prepared
        return {
            "train": of.config.data.train,
            "tokenizer_fingerprint": of.tuned.base.tokenizer.fingerprint,
            "prompts": len(of.prompts),
            "longest_prompt": of.prompts.longest,
            "validation_prompts": 0 if of.held_out is None else len(of.held_out),
        }

    def sample(self, when: Literal["before", "after"]) -> None:
        """Answers to a few held-out prompts."""
        samples = self.held_out.samples()
        if self.prepared.tuned.engine.mesh.rank == 0:
            write_samples(Path(self.prepared.config.out), samples, when)

    def export(self) -> Path:
        """Write the trained adapter (PEFT's layout) or model (Hugging Face's); returns its directory."""
        return self.prepared.tuned.export()


def unchanged(learner: Learner) -> dict[str, Any]:
    """Metrics of a step in which nothing was learned: the weights are as they were."""
    c = learner.counters
    none = {"loss": 0.0, "lr": 0.0, "grad_norm": 0.0, "tokens": c.tokens, "trained_tokens": c.trained_tokens}
    return {**none, "skipped": c.skipped + c.spikes}


def _values(groups: Sequence[Group]) -> list[list[float]]:
    return [[a.value or 0.0 for a in group.answers] for group in groups]


def _mean(values: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, values)) / sum(map(len, values))


def _error(means: list[float]) -> float:
    """Standard error of the mean over prompts, whose answers are alike: 1.96 of it is the 95% interval's half."""
    n, mean = len(means), sum(means) / len(means)
    return math.sqrt(sum((x - mean) ** 2 for x in means) / max(n - 1, 1) / n)


# -- what is watched ---------------------------------------------------------------------------------------------------


def check_mismatch(mean: float, most: float, worst: Worst, of: Prepared, behind: int) -> None:
    """Raise `TrainingError` where sampler and trainer differ by more than rounding, naming the worst token.

    behind: steps between their weights; where there are any, they differ by what was learned in them.
    """
    if mean > most and not behind:
        token = of.tuned.base.tokenizer.decode([worst.token]) if worst.token >= 0 else ""
        raise TrainingError(
            f"sampler and trainer differ: the mean of exp|difference| of their log-probabilities is {mean:.4f}, above "
            f"mismatch_stop {most:g}; worst was the token {worst.token} ({token!r}), {worst.sampled:.3f} when sampled "
            f"and {worst.trained:.3f} in training; both should have the same weights: take precision fp32, or raise "
            "mismatch_stop if the difference is meant"
        )
    worst.difference = 0.0


HEALTHY = {
    "entropy": (0.02, math.inf, "answers hardly vary: raise clip_high or temperature, or lower lr"),
    "truncated": (0.0, 0.3, "answers are cut: raise max_new_tokens, or let the reward ask for shorter ones"),
    "same_reward": (0.0, 0.8, "most groups teach nothing: take prompts of middle difficulty (prefer_middle), more "
                              "answers, or dynamic rounds"),
    "mismatch": (1.0, 1.02, "sampler and trainer drift apart: take precision fp32"),
    "clipped": (0.0, 0.3, "the policy moves far in one batch: lower lr, updates or passes"),
    "timeout": (0.0, 0.05, "the scorer runs out of time: raise its limit"),
    "crash": (0.0, 0.05, "the scorer crashes: look at the notes in rollouts/"),
}  # fmt: skip
"""Metrics of a step by name: the healthy range, and what to do outside."""


def warn_of(metrics: dict[str, Any]) -> None:
    """Say once for each metric that it left its healthy range, and the remedy."""
    for name, (low, high, remedy) in HEALTHY.items():
        value = None if name == "mismatch" and metrics.get("behind") else metrics.get(name)
        if value is not None and not low <= value <= high:
            wanted = f"at most {high:g}" if value > high else f"at least {low:g}"
            warn_once(f"{name} left its healthy range ({wanted}): {remedy}")
