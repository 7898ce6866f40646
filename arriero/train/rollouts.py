"""Answers of the policy to the prompts of a step, with their rewards: the source of a run that learns from them.

In a step the sampler takes up the current weights, each prompt is answered `answers` times, and a scorer says what the
answers are worth. What is trained on are the sampled ids themselves, terminator included, never a text encoded anew.

Everything is journaled. RUN/rollouts/ has a file for each round of each step, written when it is sampled and again
when it is scored: ids, log-probabilities, seeds, rewards and outcomes, the prompt's place, the step and a checksum of
the weights. A run that goes on from a checkpoint takes what the steps after it had sampled and scored from there, if
that was by its weights. So neither a scorer that draws lots nor another sampler changes the weights of a run that was
killed. The checkpoint's own journal has the place in the order of prompts, and how often each was solved.

Price: a few kilobytes an answer on disk. All processes exchange all answers, so that what follows (advantages over the
batch, which groups are left out) is computed alike on each of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.data.prompts import Prompt, Prompts
from arriero.distributed.mesh import Mesh
from arriero.errors import TrainingError
from arriero.infer.config import SamplingConfig
from arriero.infer.request import Completion, Request
from arriero.io.files import write_jsonl
from arriero.losses.advantages import overlong_penalty, varied
from arriero.rewards.base import Answer, Scorer
from arriero.train.learner import mixed
from arriero.train.metrics import surviving_records
from arriero.train.rl_config import RolloutConfig
from arriero.train.sampler import Sampler

VALIDATION = 2**62  # where the seeds of held-out answers begin: the same at each validation
MIDDLE = (0.2, 0.8)  # shares of right answers between which a prompt teaches most


@dataclass(frozen=True)
class Sampled:
    """One answer: its ids, terminator included, and the log-probability with which each was drawn."""

    ids: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    value: float | None = None  # None: not scored yet
    outcome: str = ""
    note: str = ""


@dataclass(frozen=True)
class Group:
    """The answers to one prompt. prompt: its index."""

    prompt: int
    seed: int
    answers: list[Sampled]


@dataclass(frozen=True)
class Rollout:
    """What a step learns from: groups with rewards [G, K], and which answers count [G, K]; metrics of the sampling."""

    step: int
    groups: list[Group]
    rewards: Tensor
    mask: Tensor
    metrics: Mapping[str, float]


class Rollouts:
    """step -> Rollout; keeps the journal."""

    def __init__(
        self,
        prompts: Prompts,
        sampler: Sampler,
        scorer: Scorer,
        config: RolloutConfig,
        *,
        n_prompts: int,
        seed: int,
        run_dir: Path,
        reward: str,
    ) -> None:
        """n_prompts: of a step. reward: what the scorer is called, for the journal."""
        self.prompts, self.sampler, self.scorer, self.config = prompts, sampler, scorer, config
        self.n_prompts, self.seed, self.directory, self.reward = n_prompts, seed, run_dir / "rollouts", reward
        self.mesh: Mesh = sampler.tuned.engine.mesh
        self.taken = 0  # place in the order of prompts
        self.solved: dict[int, float] = {}  # prompt -> mean reward when last seen
        self.seconds = {"sampling": 0.0, "scoring": 0.0}

    # -- a step ----------------------------------------------------------------------------------------------------

    def __call__(self, step: int) -> Rollout:
        """The answers of a step; further rounds make up for groups that teach nothing, where the settings allow."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.sampler.refit()
        useful: list[Group] = []
        others: list[Group] = []
        for round_ in range(1 + self.config.dynamic):
            for group in self._round(step, round_):
                rewards, mask = self.rewards([group])
                (useful if varied(rewards, mask)[0] else others).append(group)
                self.solved[group.prompt] = float((rewards * mask).sum() / mask.sum().clamp(min=1))
            if len(useful) >= self.n_prompts or not self.config.dynamic:
                break
        groups = (useful + others)[: self.n_prompts]
        rewards, mask = self.rewards(groups)
        return Rollout(step, groups, rewards, mask, self._metrics(useful + others))

    def rewards(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """Rewards [G, K], penalties for length taken off, and 1 for each answer that counts."""
        value = torch.tensor([[float(a.value or 0.0) for a in group.answers] for group in groups])
        finished = torch.tensor([[float(a.finished) for a in group.answers] for group in groups])
        lengths = torch.tensor([[float(len(a.ids)) for a in group.answers] for group in groups])
        config = self.config
        value = value + overlong_penalty(lengths, config.max_new_tokens, config.overlong_margin)
        return value, finished if config.truncated == "mask" else torch.ones_like(finished)

    def _round(self, step: int, round_: int) -> list[Group]:
        """One round of prompts, answered and scored; from the journal where that has them."""
        chosen = self._next()
        path = self.directory / f"step-{step + 1:08d}-{round_}.jsonl"
        groups = self._recorded(path, chosen)
        if not groups:
            seeds = [mixed(self.seed, step, (round_ << 32) + i) for i in range(len(chosen))]
            groups = self.sampled(self.prompts, chosen, seeds, self.config.answers)
            self._write(path, groups, step)
        if any(answer.value is None for group in groups for answer in group.answers):
            groups = self.scored(self.prompts, groups)
            self._write(path, groups, step)
        return groups

    def _next(self) -> list[int]:
        """The prompts of a round: the next ones, or of twice as many those that were neither easy nor hard."""
        n = self.n_prompts
        if not self.config.prefer_middle:
            chosen = self.prompts.taken(self.seed, self.taken, n)
            self.taken += n
            return chosen
        candidates = self.prompts.taken(self.seed, self.taken, 2 * n)
        low, high = MIDDLE
        apart = [i for i in candidates if not low <= self.solved.get(i, 0.5) <= high]
        middle = [i for i in candidates if low <= self.solved.get(i, 0.5) <= high]
        self.taken += 2 * n
        return (middle + apart)[:n]

    # -- sampling and scoring --------------------------------------------------------------------------------------

    def sampled(self, prompts: Prompts, chosen: Sequence[int], seeds: Sequence[int], n: int) -> list[Group]:
        """n answers to each of the chosen prompts, on all processes; each group answers its share."""
        began = time.perf_counter()
        mine = self._mine(len(chosen))
        requests = [
            Request(
                prompts[chosen[i]].ids, self.config.max_new_tokens,
                SamplingConfig(temperature=self.config.temperature, seed=seeds[i]), n=n, logprobs=0,
            )
            for i in mine
        ]  # fmt: skip
        answers = self.sampler.answer(requests) if requests else []
        groups = [Group(chosen[i], seeds[i], [_sampled(a) for a in of]) for i, of in zip(mine, answers, strict=True)]
        groups = self._shared(groups)
        self.seconds["sampling"] += time.perf_counter() - began
        return groups

    def scored(self, prompts: Prompts, groups: Sequence[Group]) -> list[Group]:
        """The groups with what their answers are worth; each process group scores its share."""
        began = time.perf_counter()
        mine = [groups[i] for i in self._mine(len(groups))]
        asked = [_answer(prompts[group.prompt], a) for group in mine for a in group.answers]
        scores = iter(self.scorer(asked) if asked else [])
        found = []
        for group in mine:
            each = [(a, next(scores)) for a in group.answers]
            for _, s in each:
                if not math.isfinite(s.value):
                    raise TrainingError(
                        f"{prompts[group.prompt].where}: the reward of an answer is {s.value}; it must be a finite "
                        f"number: mend the reward {self.reward}"
                    )
            rated = [replace(a, value=float(s.value), outcome=s.outcome, note=s.note) for a, s in each]
            found.append(replace(group, answers=rated))
        shared = self._shared(found)
        self.seconds["scoring"] += time.perf_counter() - began
        return shared

    def _mine(self, n: int) -> range:
        """Which of n prompts this process answers: the first of a data-parallel group does, for all of it."""
        mesh = self.mesh
        if not mesh.is_first("tp"):
            return range(0)
        return range(n * mesh.dp_rank // mesh.dp_size, n * (mesh.dp_rank + 1) // mesh.dp_size)

    def _shared(self, groups: list[Group]) -> list[Group]:
        """All processes' groups, in order, on all of them."""
        if not self.mesh.distributed:
            return groups
        parts: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(parts, (self.mesh.dp_rank, groups))
        return [group for _, part in sorted(parts, key=lambda part: part[0]) for group in part]

    # -- the journal -----------------------------------------------------------------------------------------------

    def _write(self, path: Path, groups: Sequence[Group], step: int) -> None:
        if self.mesh.rank > 0:
            return
        of_step = {"step": step + 1, "weights": {"step": step, "checksum": self.sampler.weights}, "reward": self.reward}
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for group in groups:
            prompt = self.prompts[group.prompt]
            asked = {"file": prompt.file, "row": prompt.row, "text": prompt.text}
            rows.append({**of_step, "asked": asked, **asdict(group)})
        write_jsonl(path, rows)

    def _recorded(self, path: Path, chosen: Sequence[int]) -> list[Group]:
        """What the journal has of a round, if these weights sampled it; [] where it has nothing. On all processes."""
        found: list[Group] = []
        if self.mesh.rank == 0 and path.exists():
            rows = surviving_records(path)
            same = [row["prompt"] for row in rows] == list(chosen)
            if same and all(row["weights"]["checksum"] == self.sampler.weights for row in rows):
                found = [
                    Group(row["prompt"], row["seed"], [Sampled(**answer) for answer in row["answers"]]) for row in rows
                ]
        if self.mesh.distributed:
            parts = [found]
            dist.broadcast_object_list(parts, 0, device=self.mesh.device)
            found = parts[0]
        return found

    def tensors(self) -> Mapping[str, Tensor]:
        """None: all that a checkpoint has to hold is a few numbers."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """The place in the order of prompts, and how often each was solved."""
        return {"taken": self.taken, "solved": [[i, share] for i, share in sorted(self.solved.items())]}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.taken, self.solved = state["taken"], {int(i): share for i, share in state["solved"]}

    # -- metrics ---------------------------------------------------------------------------------------------------

    def _metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        rewards, mask = self.rewards(groups)
        answers = [a for group in groups for a in group.answers]
        n_tokens = sum(len(a.ids) for a in answers)
        n = len(answers)
        found = {
            "reward": float((rewards * mask).sum() / mask.sum().clamp(min=1)),
            "answer_tokens": n_tokens / n,
            "truncated": sum(not a.finished for a in answers) / n,
            "same_reward": 1 - float(varied(rewards, mask).mean()),
            "sampling_seconds": self.seconds["sampling"],
            "scoring_seconds": self.seconds["scoring"],
        }
        for outcome in ("timeout", "crash"):
            if share := sum(a.outcome == outcome for a in answers) / n:
                found[outcome] = share
        return found


def _sampled(answer: Completion) -> Sampled:
    """The ids that were drawn, with the terminator where one was."""
    ids = list(answer.ids)
    if isinstance(answer.stopped_by, int):
        ids.append(answer.stopped_by)
    logprobs = [float(p.sampled) for p in answer.logprobs or () if p.sampled is not None]
    assert len(logprobs) == len(ids), "a log-probability of every token"
    return Sampled(ids, logprobs, answer.stopped, answer.text)


def _answer(prompt: Prompt, sampled: Sampled) -> Answer:
    asked: Any = prompt.messages
    return Answer(asked, sampled.text, sampled.finished, prompt.fields, prompt.where)
