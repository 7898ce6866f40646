"""Similarity of an answer to its reference: metrics of libraries, and two simple ones of our own.

ROUGE-L (Lin 2004) by rouge-score, chrF (Popovic 2015) by sacrebleu: both optional (extra "eval"), both per row, so that
rows can be resampled. rouge-score keeps Latin letters and digits only: for other scripts use chrF.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from arriero.errors import require

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(r"\b(?:(?i:e\.g|i\.e|etc|vs|cf|approx|resp|no)|[A-Z])\.$")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TextScores:
    """One answer against its reference; each in [0, 1]."""

    rouge_l: float
    chrf: float
    exact: float


def text_scorer() -> Callable[[str, str], TextScores]:
    """Return score(reference, answer) -> TextScores; raises `UserError` naming the extra if a library is missing.

    rouge_l: F1 of the longest common subsequence of words, without stemming. chrf: sacrebleu's sentence chrF2
    (character 6-grams, beta 2), divided by 100. exact: 1 where `normalised` texts are equal.
    """
    rouge = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeL"])
    chrf = require("sacrebleu.metrics", "eval").CHRF()

    def score(reference: str, answer: str) -> TextScores:
        return TextScores(
            rouge_l=rouge.score(reference, answer)["rougeL"].fmeasure,
            chrf=chrf.sentence_score(answer, [reference]).score / 100,
            exact=float(normalised(reference) == normalised(answer)),
        )

    return score


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, runs of white space as one space: what exact match compares."""
    return " ".join(text.casefold().translate(_PUNCTUATION).split())


def is_one_sentence(text: str) -> bool:
    """Whether a text is one line that ends no sentence before its end ("e.g.", "i.e." and initials end none)."""
    text = text.strip()
    if not text or "\n" in text:
        return False
    ends = (text[: m.start() + 1] for m in _SENTENCE_END.finditer(text))
    return all(_ABBREVIATION.search(head) for head in ends)
