"""Answers, and episodes of several: what was sampled, what was said to it, and what is known of its worth.

An episode is one sequence of ids behind its prompt: an answer as it was sampled, terminator included, the reply's ids,
the next answer, and so on. Nothing of it is ever encoded anew, so what is trained on is what was sampled, and the cache
of the engine still has it when the next answer begins. An answer that no environment replies to is an episode of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from arriero.data.batch import IGNORED
from arriero.data.prompts import Prompt
from arriero.errors import TrainingError
from arriero.infer.config import SamplingConfig
from arriero.infer.request import Completion, Request
from arriero.rewards.base import Answer, Score
from arriero.show.terminal import warn_once
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_reply
from arriero.train.learner import mixed
from arriero.train.rl_config import RolloutConfig


@dataclass(frozen=True)
class Past:
    """An answer that was replied to: its tokens and the reply's, the texts of both, and what it was worth."""

    n_answer: int
    n_reply: int
    text: str
    reply: str
    reward: float


@dataclass(frozen=True)
class Sampled:
    """An episode so far, or all of it.

    ids: behind the prompt, answers with their terminators. logprobs: with which each was drawn, 0 for a reply's.
    finished, text: whether the last answer has an end, and what it says. earlier: what came before that.
    value: the sum of rewards; None while it goes on.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    text: str = ""
    value: float | None = None
    outcome: str = ""
    note: str = ""
    earlier: list[Past] = field(default_factory=list)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Sampled:
        """As the journal has it."""
        return cls(**row | {"earlier": [Past(**past) for past in row.get("earlier", ())]})

    @property
    def _before(self) -> int:
        return sum(past.n_answer + past.n_reply for past in self.earlier)

    @property
    def asked(self) -> bool:
        """Whether an answer is due, rather than what it is worth."""
        return self.value is None and len(self.ids) == self._before

    @property
    def answered(self) -> bool:
        """Whether it waits to hear what its last answer is worth."""
        return self.value is None and not self.asked

    @property
    def own(self) -> list[float]:
        """1 for each of the ids that the policy chose, 0 for those of replies."""
        found: list[float] = []
        for past in self.earlier:
            found += [1.0] * past.n_answer + [0.0] * past.n_reply
        return found + [1.0] * (len(self.ids) - len(found))

    @property
    def targets(self) -> list[int]:
        """What is predicted: the ids that the policy chose."""
        return [token if chose else IGNORED for token, chose in zip(self.ids, self.own, strict=True)]

    @property
    def answers(self) -> list[int]:
        """Tokens of each answer."""
        return [*(past.n_answer for past in self.earlier), len(self.ids) - self._before]

    def rewards_with(self, score: float) -> list[float]:
        """What each answer was worth, at its last token; 0 at all others. At the very last, what makes `score` of it.

        score: the episode's value, a penalty for length taken off, or whitened.
        """
        found, at = [0.0] * len(self.ids), 0
        for past in self.earlier:
            found[at + past.n_answer - 1] = past.reward
            at += past.n_answer + past.n_reply
        found[-1] = score - sum(past.reward for past in self.earlier)
        return found

    @property
    def shown(self) -> str:
        """What was said, for a reader."""
        return "".join(f"{past.text}\n← {past.reply}\n→ " for past in self.earlier) + self.text

    def going_on(self, answer: Completion) -> Sampled:
        """With the answer that was sampled, its terminator where it has one."""
        ids = list(answer.ids)
        if isinstance(answer.stopped_by, int):
            ids.append(answer.stopped_by)
        logprobs = [float(p.sampled) for p in answer.logprobs or () if p.sampled is not None]
        assert len(logprobs) == len(ids), "a log-probability of every token"
        return replace(
            self, ids=self.ids + ids, logprobs=self.logprobs + logprobs, finished=answer.stopped, text=answer.text
        )

    def worth(self, score: Score, reply: Sequence[int] | None) -> Sampled:
        """With what the last answer is worth, and the reply to it; None: it was the last."""
        if reply is None:
            value = sum(past.reward for past in self.earlier) + score.value
            return replace(self, value=float(value), outcome=score.outcome, note=score.note)
        past = Past(self.answers[-1], len(reply), self.text, said(score.reply), float(score.value))
        return replace(
            self, ids=[*self.ids, *reply], logprobs=self.logprobs + [0.0] * len(reply), finished=False, text="",
            earlier=[*self.earlier, past],
        )  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The answers to one prompt. prompt: its index."""

    prompt: int
    seed: int
    answers: list[Sampled]

    @classmethod
    def of(cls, row: dict[str, Any]) -> Group:
        """As the journal has it."""
        return cls(row["prompt"], row["seed"], [Sampled.of(answer) for answer in row["answers"]])

    def requests(self, prompt: Prompt, config: RolloutConfig) -> Iterator[tuple[list[int], Request]]:
        """What has to be sampled next, and for which of the answers: the first ones at once."""
        waiting = [k for k, answer in enumerate(self.answers) if answer.asked]

        def request(behind: Sequence[int], seed: int, n: int) -> Request:
            sampling = SamplingConfig(temperature=config.temperature, seed=seed)
            return Request([*prompt.ids, *behind], config.max_new_tokens, sampling, n=n, logprobs=0)

        if len(waiting) == len(self.answers) and not any(answer.ids for answer in self.answers):
            yield waiting, request([], self.seed, len(waiting))
            return
        for k in waiting:
            answer = self.answers[k]
            yield [k], request(answer.ids, mixed(self.seed + k, len(answer.earlier), 1), 1)

    def to_score(self, prompt: Prompt) -> Iterator[tuple[int, Answer]]:
        """The answers that nobody has scored, and which they are."""
        messages: Any = prompt.messages
        for k, a in enumerate(self.answers):
            if a.answered:
                earlier = [past.text for past in a.earlier]
                yield (
                    k,
                    Answer(messages, a.text, a.finished, prompt.fields, prompt.where, earlier, self.seed, k),
                )

    def changed(self, answers: dict[int, Sampled]) -> Group:
        """With some of the answers replaced."""
        return replace(self, answers=[answers.get(k, answer) for k, answer in enumerate(self.answers)])


def judged(sampled: Sampled, score: Score, prompt: Prompt, config: RolloutConfig, tokenizer: Tokenizer) -> Sampled:
    """The episode with a score of its last answer, and the ids of the reply. Raises `TrainingError` for a value of NaN.

    It ends where nothing is replied, with the last turn, and with a reply that is too long or that the template does
    not write, which counts as a crash.
    """
    if not math.isfinite(score.value):
        raise TrainingError(
            f"{prompt.where}: the reward of an answer is {score.value}; it must be a finite number: mend the reward "
            f"{config.environment or ''}".rstrip()
        )
    if score.reply is None:
        return sampled.worth(score, None)
    if len(sampled.earlier) + 1 == config.turns:
        note = f"{score.note}; " if score.note else ""
        return sampled.worth(replace(score, note=f"{note}ended after {config.turns} turns"), None)
    messages = [{"role": "user", "content": score.reply}] if isinstance(score.reply, str) else score.reply
    ids = encode_reply(tokenizer, prompt.messages, messages, prompt.tools)
    if len(ids) <= config.max_reply:
        return sampled.worth(score, ids)
    note = f"a reply of {len(ids):,} tokens, and max_reply is {config.max_reply:,}"
    warn_once(f"an environment's replies are too long, which ends episodes: {note}; raise it, or say less")
    return sampled.worth(replace(score, outcome="crash", note=note), None)


def said(reply: Any) -> str:
    """A reply as text, for a reader."""
    return reply if isinstance(reply, str) else "\n".join(f"{m['role']}: {m['content']}" for m in reply)
