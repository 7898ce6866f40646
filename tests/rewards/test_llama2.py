"""Llama 2's combination of safety and helpfulness, worked by hand."""

from __future__ import annotations

import math

import pytest

from arriero.errors import ConfigError
from arriero.rewards.base import Answer, Score, Scorer
from arriero.rewards.llama2 import Combined, whitened
from arriero.rewards.open import open_scorer


class Known(Scorer):
    """The values of a field of the row; null is an answer that crashed."""

    def __init__(self, field):
        self.field = field

    def __call__(self, answers):
        return [Score(a.row[self.field]) if a.row[self.field] is not None else Score(0.0, "crash") for a in answers]


def logit(p):
    return math.log(p / (1 - p))


def answers(*rows):
    return [Answer("", "", row={"s": s, "h": h, "safety": tagged}) for s, h, tagged in rows]


def test_safety_counts_below_015_and_where_the_prompt_is_tagged_else_helpfulness():
    given = answers((logit(0.149), 2.0, False), (logit(0.151), 2.0, False), (logit(0.9), -1.0, True))
    found = Combined(Known("s"), Known("h"), whiten=False)(given)
    assert [score.value for score in found] == [logit(0.149), 2.0, logit(0.9)]
    assert [score.note for score in found] == ["safety", "helpfulness", "safety"]


def test_a_batch_is_whitened_without_those_that_were_not_scored():
    found = Combined(Known("s"), Known("h"))(answers((3, 1.0, 0), (3, 3.0, 0), (None, 9.0, 0), (3, 5.0, 0)))
    assert [score.outcome for score in found] == ["scored", "scored", "crash", "scored"]
    deviation = math.sqrt(8 / 3)
    assert [found[i].value for i in (0, 1, 3)] == pytest.approx([-2 / deviation, 0, 2 / deviation])


def test_whitening_of_one_value_or_equal_ones_is_0():
    assert whitened([]) == []
    assert whitened([3.0]) == whitened([5.0]) == [0]
    assert whitened([2.0, 2.0]) == [0, 0]


def test_extreme_scores_do_not_overflow():
    found = Combined(Known("s"), Known("h"), whiten=False)(answers((-1e6, 1.0, 0), (1e6, 1.0, 0)))
    assert [score.value for score in found] == [-1e6, 1.0]


def test_two_rewards_are_named_with_a_comma(tmp_path):
    (tmp_path / "r.py").write_text("def s(a): return -5.0\ndef h(a): return 1.0\n")
    with open_scorer(f"llama2-plain:python:{tmp_path / 'r.py'}:s,python:{tmp_path / 'r.py'}:h") as scorer:
        assert scorer([Answer("", "x")])[0].value == -5
    with pytest.raises(ConfigError, match="write llama2:SAFETY,HELPFULNESS"):
        open_scorer("llama2:exact")
