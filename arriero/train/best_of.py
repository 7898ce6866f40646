"""Of the answers that were sampled and scored, those that are worth learning. Plain functions, no torch.

Guards stand between the reward and what is learned: an answer that was cut has no end to learn; one far longer than the
others to its prompt may owe its reward to its length; one and the same long text to many prompts is what a model
collapses to. What each guard leaves out is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from arriero.rewards.base import Outcome, Score

SHORT = 32  # tokens up to which no answer is too long
SAME = 16  # characters from which equal answers to different prompts are suspicious


@dataclass(frozen=True)
class Sampled:
    """One answer to prompt number `prompt`, with how it was sampled and what it is worth."""

    prompt: int
    text: str
    tokens: int
    finished: bool
    temperature: float
    round: int
    value: float
    outcome: Outcome = "scored"
    note: str = ""

    @classmethod
    def of(
        cls, prompt: int, text: str, tokens: int, finished: bool, temperature: float, round: int, score: Score
    ) -> Sampled:
        """An answer with its score."""
        return cls(prompt, text, tokens, finished, temperature, round, score.value, score.outcome, score.note)


@dataclass
class Choice:
    """What was chosen, best first for each prompt, and how many answers (or prompts) were left out and why."""

    chosen: list[Sampled] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def choose(
    answers: Sequence[Sampled], *, keep: int, above: float, max_length_ratio: float, max_same: float, seed: int
) -> Choice:
    """The best `keep` different answers of each prompt, in the order of the prompts.

    Equal rewards are ordered by a hash of `seed`, prompt and text, so that neither length nor round is favoured.
    """
    choice = Choice()
    for prompt, group in sorted(_by_prompt(answers).items()):
        fit = _fit(group, above, max_length_ratio, choice.left_out)
        texts: dict[str, Sampled] = {}
        for answer in sorted(fit, key=lambda a: (-a.value, _draw(seed, prompt, a.text))):
            texts.setdefault(answer.text, answer)
        choice.left_out["prompts without an answer to learn"] += not texts
        choice.chosen += list(texts.values())[:keep]
    _thin(choice, max_same, seed)
    choice.left_out = +choice.left_out
    return choice


def _by_prompt(answers: Sequence[Sampled]) -> dict[int, list[Sampled]]:
    groups: dict[int, list[Sampled]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    return groups


def _fit(group: Sequence[Sampled], above: float, max_length_ratio: float, left_out: Counter[str]) -> list[Sampled]:
    """Whole answers above the threshold, and not far longer than the others."""
    whole = [answer for answer in group if answer.finished and answer.text.strip()]
    left_out["cut or empty"] += len(group) - len(whole)
    good = [answer for answer in whole if answer.outcome == "scored" and answer.value > above]
    left_out["not above the threshold"] += len(whole) - len(good)
    if not max_length_ratio or not good:
        return good
    longest = max(SHORT, max_length_ratio * median(answer.tokens for answer in whole))
    short = [answer for answer in good if answer.tokens <= longest]
    left_out["too long"] += len(good) - len(short)
    return short


def _thin(choice: Choice, max_same: float, seed: int) -> None:
    """Leave out what is above the share that one text may have."""
    most = max(1, int(max_same * len(choice.chosen)))
    counts: Counter[str] = Counter()
    kept: set[int] = set()
    for i in sorted(
        range(len(choice.chosen)), key=lambda i: _draw(seed, choice.chosen[i].prompt, choice.chosen[i].text)
    ):
        text = choice.chosen[i].text.strip()
        counts[text] += 1
        if len(text) < SAME or counts[text] <= most:
            kept.add(i)
    choice.left_out["the same text as others"] += len(choice.chosen) - len(kept)
    choice.chosen = [answer for i, answer in enumerate(choice.chosen) if i in kept]


def _draw(seed: int, prompt: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{prompt}\0{text}".encode("utf-8", "surrogatepass")).digest()


def statistics(answers: Sequence[Sampled], choice: Choice) -> dict[str, Any]:
    """What a round's answers came to, and what was chosen of all answers: for its record."""
    by_temperature = {}
    for temperature in sorted({answer.temperature for answer in answers}):
        those = [answer for answer in answers if answer.temperature == temperature]
        won = sum(answer.temperature == temperature and answer.round == answers[0].round for answer in choice.chosen)
        by_temperature[f"{temperature:g}"] = {
            "answers": len(those),
            "mean_reward": fmean(answer.value for answer in those),
            "finished": fmean(answer.finished for answer in those),
            "different": len({(a.prompt, a.text) for a in those}) / len(those),
            "chosen": won,
        }
    rounds = Counter(answer.round for answer in choice.chosen)
    outcomes: Mapping[str, int] = Counter(answer.outcome for answer in answers)
    return {
        "answers": len(answers),
        "mean_reward": fmean(answer.value for answer in answers),
        "outcomes": dict(sorted(outcomes.items())),
        "temperatures": by_temperature,
        "mean_tokens": fmean(answer.tokens for answer in answers),
        "chosen": len(choice.chosen),
        "chosen_mean_reward": fmean(answer.value for answer in choice.chosen) if choice.chosen else None,
        "chosen_mean_tokens": fmean(answer.tokens for answer in choice.chosen) if choice.chosen else None,
        "chosen_of_round": {str(number): rounds[number] for number in sorted(rounds)},
        "left_out": dict(sorted(choice.left_out.items())),
    }
