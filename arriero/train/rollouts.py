"""Answers of the policy to the prompts of a step, with their rewards: the source of a run that learns from them.

In a step the sampler takes up the current weights, each prompt is answered `answers` times, and a scorer says what the
answers are worth; an environment replies, and is answered again, until all episodes are over (episodes.py has what
becomes of one). What is trained on are the sampled ids, terminators included, never a text encoded anew.

Everything is journaled. RUN/rollouts/ has a file for each round of each step, written when it is sampled and again
when it is scored, in each turn: ids, log-probabilities, seeds, rewards and outcomes, the prompt's place, the step and a
checksum of the weights. A run that goes on from a checkpoint takes what the steps after it had sampled and scored from
there, if that was by its weights. So neither a scorer that draws lots nor another sampler changes the weights of a run
that was killed. The checkpoint's own journal has the place in the order of prompts, and how often each was solved.

With `rollout_lag` N the answers of step s are begun when step s - N is, by the weights of then, and a worker elsewhere
(ray_sampler.py) samples them while this process learns. A checkpoint waits for what is under way, so it needs none of
those weights: a run that goes on finds the answers in the journal, and is the run that was not killed.

Price: a few kilobytes an answer on disk. All processes exchange all answers, so that what follows (advantages over the
batch, which groups are left out) is computed alike on each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.data.prompts import Prompts
from arriero.distributed.mesh import Mesh
from arriero.errors import CheckpointError
from arriero.io.files import write_jsonl
from arriero.losses.advantages import overlong_penalty, varied
from arriero.rewards.base import Scorer
from arriero.train.episodes import Group, Sampled, judged
from arriero.train.journal import read_round
from arriero.train.learner import mixed
from arriero.train.rl_config import RolloutConfig
from arriero.train.sampler import Sampler, Weights
from arriero.train.turns import Turns

VALIDATION = 2**62  # where the seeds of held-out answers begin: the same at each validation
MIDDLE = (0.2, 0.8)  # shares of right answers between which a prompt teaches most


@dataclass(frozen=True)
class Rollout:
    """What a step learns from: groups with rewards [G, K], and which answers count [G, K]; metrics of the sampling."""

    step: int
    groups: list[Group]
    rewards: Tensor
    mask: Tensor
    metrics: Mapping[str, float]
    behind: int = 0
    solved: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Begun:
    """A step whose prompts are chosen, and the weights that answer them: those after step `weights_step`."""

    step: int
    chosen: list[int]
    weights: Weights
    weights_step: int


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
        steps: int,
    ) -> None:
        """n_prompts: of a step. reward: what the scorer is called, for the journal. steps: of the run."""
        self.prompts, self.sampler, self.scorer, self.config = prompts, sampler, scorer, config
        self.n_prompts, self.seed, self.directory, self.reward = n_prompts, seed, run_dir / "rollouts", reward
        self.mesh: Mesh = sampler.tuned.engine.mesh
        self.steps = steps
        self.turns = Turns(config.rollout_lag > 0 and config.rollout != "here")
        self.under_way: dict[int, tuple[Begun, Future[Rollout]]] = {}  # by step
        self.taken = 0  # place in the order of prompts
        self.solved: dict[int, float] = {}  # prompt -> mean reward when last seen
        self.seconds = {"sampling": 0.0, "scoring": 0.0}
        self.reused: list[float] = []  # of each later turn of a step: the share of its tokens that the cache had

    # -- a step ----------------------------------------------------------------------------------------------------

    def __call__(self, step: int) -> Rollout:
        """The answers of a step; those of the steps that run ahead are begun, with the weights as they are now."""
        for ahead in range(step, max(step + 1, min(step + self.config.rollout_lag + 1, self.steps))):
            if ahead not in self.under_way:
                begun_now = Begun(ahead, self._next(), self.sampler.current(), step)
                self.under_way[ahead] = begun_now, self.turns.run(self._rollout, begun_now)
        rollout = self.under_way.pop(step)[1].result()
        self.solved.update(rollout.solved)
        return rollout

    def _rollout(self, of: Begun) -> Rollout:
        """Further rounds make up for groups that teach nothing, where the settings allow."""
        self.seconds, self.reused = dict.fromkeys(self.seconds, 0.0), []
        useful: list[Group] = []
        others: list[Group] = []
        solved: dict[int, float] = {}
        for round_ in range(1 + self.config.dynamic):
            for group in self._round(of, round_, self._next(solved) if round_ else of.chosen):
                rewards, mask = self.rewards([group])
                (useful if varied(rewards, mask)[0] else others).append(group)
                solved[group.prompt] = float((rewards * mask).sum() / mask.sum().clamp(min=1))
            if len(useful) >= self.n_prompts or not self.config.dynamic:
                break
        groups = (useful + others)[: self.n_prompts]
        rewards, mask = self.rewards(groups)
        behind = of.step - of.weights_step
        return Rollout(of.step, groups, rewards, mask, self._metrics(useful + others, behind), behind, solved)

    def answered(self, prompts: Prompts, groups: list[Group], weights: Weights) -> list[Group]:
        """The groups played with these weights, in turn with what runs ahead."""

        def play() -> list[Group]:
            self.sampler.take(weights)
            return self.played(prompts, groups)

        return self.turns.run(play).result()

    def rewards(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """Rewards [G, K], penalties for length taken off, and 1 for each answer that counts."""
        value = torch.tensor([[float(a.value or 0.0) for a in group.answers] for group in groups])
        finished = torch.tensor([[float(a.finished) for a in group.answers] for group in groups])
        lengths = torch.tensor([[float(max(a.answers)) for a in group.answers] for group in groups])
        config = self.config
        value = value + overlong_penalty(lengths, config.max_new_tokens, config.overlong_margin)
        return value, finished if config.truncated == "mask" else torch.ones_like(finished)

    def _round(self, of: Begun, round_: int, chosen: list[int]) -> list[Group]:
        """One round of prompts, answered and scored; from the journal where that has them."""
        path = self.directory / f"step-{of.step + 1:08d}-{round_}.jsonl"
        groups = self._recorded(path, chosen, of.weights.checksum)
        if not groups:
            seeds = [mixed(self.seed, of.step, (round_ << 32) + i) for i in range(len(chosen))]
            groups = begun(chosen, seeds, self.config.answers)
        if any(answer.value is None for group in groups for answer in group.answers):
            if not of.weights.tensors:
                raise CheckpointError(
                    f"{path} is not what the run left there: its answers are by weights that are gone; begin a new run"
                )
            self.sampler.take(of.weights)
        return self.played(self.prompts, groups, lambda so_far: self._write(path, so_far, of))

    def _next(self, seen: Mapping[int, float] | None = None) -> list[int]:
        """The prompts of a round: the next ones, or of twice as many those that were neither easy nor hard.

        seen: how often prompts were solved in earlier rounds of the step.
        """
        n, solved = self.n_prompts, {**self.solved, **(seen or {})}
        if not self.config.prefer_middle:
            chosen = self.prompts.taken(self.seed, self.taken, n)
            self.taken += n
            return chosen
        candidates = self.prompts.taken(self.seed, self.taken, 2 * n)
        low, high = MIDDLE
        apart = [i for i in candidates if not low <= solved.get(i, 0.5) <= high]
        middle = [i for i in candidates if low <= solved.get(i, 0.5) <= high]
        self.taken += 2 * n
        return (middle + apart)[:n]

    # -- sampling and scoring --------------------------------------------------------------------------------------

    def played(
        self, prompts: Prompts, groups: list[Group], record: Callable[[list[Group]], None] = lambda groups: None
    ) -> list[Group]:
        """The groups with all answers sampled and scored, turn by turn; `record` is given them after each half of one.

        On all processes.
        """
        while any(answer.value is None for group in groups for answer in group.answers):
            asked = any(answer.asked for group in groups for answer in group.answers)
            groups = (self.sampled if asked else self.scored)(prompts, groups)
            record(groups)
        return groups

    def sampled(self, prompts: Prompts, groups: Sequence[Group]) -> list[Group]:
        """The groups with an answer wherever one is due; each process group answers its share."""
        began = time.perf_counter()
        mine = [groups[i] for i in self._mine(len(groups))]
        asked = [(g, ks, r) for g, of in enumerate(mine) for ks, r in of.requests(prompts[of.prompt], self.config)]
        found = self.sampler.answer([request for _, _, request in asked]) if asked else []
        answers: list[dict[int, Sampled]] = [{} for _ in mine]
        for (g, ks, request), completions in zip(asked, found, strict=True):
            for k, completion in zip(ks, completions, strict=True):
                answers[g][k] = mine[g].answers[k].going_on(completion)
                if answers[g][k].earlier:
                    self.reused += [completion.cached / len(request.prompt)]
        shared = self._shared([group.changed(of) for group, of in zip(mine, answers, strict=True)])
        self.seconds["sampling"] += time.perf_counter() - began
        return shared

    def scored(self, prompts: Prompts, groups: Sequence[Group], scorer: Scorer | None = None) -> list[Group]:
        """The groups with what their answers are worth, and replies; each process group scores its share.

        scorer: another than that of the steps.
        """
        began = time.perf_counter()
        mine = [groups[i] for i in self._mine(len(groups))]
        asked = [(g, k, answer) for g, of in enumerate(mine) for k, answer in of.to_score(prompts[of.prompt])]
        scores = (scorer or self.scorer)([answer for _, _, answer in asked]) if asked else []
        tokenizer = self.sampler.tuned.base.tokenizer
        answers: list[dict[int, Sampled]] = [{} for _ in mine]
        for (g, k, _), score in zip(asked, scores, strict=True):
            answers[g][k] = judged(mine[g].answers[k], score, prompts[mine[g].prompt], self.config, tokenizer)
        shared = self._shared([group.changed(of) for group, of in zip(mine, answers, strict=True)])
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

    def _write(self, path: Path, groups: Sequence[Group], of: Begun) -> None:
        if self.mesh.rank > 0:
            return
        weights = {"step": of.weights_step, "checksum": of.weights.checksum}
        of_step = {"step": of.step + 1, "weights": weights, "reward": self.reward}
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for group in groups:
            prompt = self.prompts[group.prompt]
            asked = {"file": prompt.file, "row": prompt.row, "text": prompt.text}
            rows.append({**of_step, "asked": asked, **asdict(group)})
        write_jsonl(path, rows)

    def _recorded(self, path: Path, chosen: Sequence[int], checksum: int) -> list[Group]:
        """What the journal has of a round, if the weights of that checksum sampled it; else []. On all processes."""
        found: list[Group] = []
        if self.mesh.rank == 0 and path.exists():
            checksums, groups = read_round(path)
            if [group.prompt for group in groups] == list(chosen) and checksums <= {checksum}:
                found = groups
        if self.mesh.distributed:
            parts = [found]
            dist.broadcast_object_list(parts, 0, device=self.mesh.device)
            found = parts[0]
        return found

    def tensors(self) -> Mapping[str, Tensor]:
        """None: all that a checkpoint has to hold is a few numbers."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """The place in the order of prompts, how often each was solved, and which steps run ahead.

        Waits until these are answered: their answers are in the journal then, and their weights need not be kept.
        """
        ahead = []
        for of, future in self.under_way.values():
            future.result()
            ahead.append([of.step, of.chosen, of.weights.checksum, of.weights_step])
        solved = [[i, share] for i, share in sorted(self.solved.items())]
        return {"taken": self.taken, "solved": solved, **({"ahead": ahead} if ahead else {})}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.taken, self.solved = state["taken"], {int(i): share for i, share in state["solved"]}
        for step, chosen, checksum, weights_step in state.get("ahead", ()):
            of = Begun(step, chosen, Weights({}, checksum), weights_step)
            self.under_way[step] = of, self.turns.run(self._rollout, of)

    # -- metrics ---------------------------------------------------------------------------------------------------

    def _metrics(self, groups: Sequence[Group], behind: int) -> dict[str, float]:
        rewards, mask = self.rewards(groups)
        answers = [a for group in groups for a in group.answers]
        n_tokens = sum(sum(a.answers) for a in answers)
        n = len(answers)
        found = {
            "reward": float((rewards * mask).sum() / mask.sum().clamp(min=1)),
            "answer_tokens": n_tokens / n,
            "truncated": sum(not a.finished for a in answers) / n,
            "same_reward": 1 - float(varied(rewards, mask).mean()),
            "sampling_seconds": self.seconds["sampling"],
            "scoring_seconds": self.seconds["scoring"],
        }
        if self.config.rollout_lag:
            found["behind"] = float(behind)
        if self.config.environment:
            found["turns"] = sum(len(a.answers) for a in answers) / n
        if self.reused:
            found["reused"] = sum(self.reused) / len(self.reused)
        for outcome in ("timeout", "crash"):
            if share := sum(a.outcome == outcome for a in answers) / n:
                found[outcome] = share
        return found


def begun(chosen: Sequence[int], seeds: Sequence[int], n: int) -> list[Group]:
    """n answers to each of the chosen prompts, none of which is sampled yet."""
    return [Group(prompt, seed, [Sampled()] * n) for prompt, seed in zip(chosen, seeds, strict=True)]
