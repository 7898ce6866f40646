"""Verifiers by a rule: what is right, what is wrong, and what only looks right."""

from __future__ import annotations

from fractions import Fraction

import pytest

from arriero.errors import ConfigError, DataError
from arriero.rewards import numeric
from arriero.rewards.base import CUT, Answer, shares
from arriero.rewards.final import boxed, final_answers
from arriero.rewards.open import open_scorer


def score(spec, text, answer, finished=True):
    (found,) = open_scorer(spec)([Answer("What?", text, finished, {"answer": answer}, "row 3 of mine.jsonl")])
    return found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-7", -7),
        ("\u22127", -7),
        ("it is 1,234,567.5 in all", Fraction("1234567.5")),
        ("1{,}234", 1234),
        ("1\\,234", 1234),
        ("12\u202f345", 12345),
        ("1_000", 1000),
        ("$ 12.50.", Fraction("12.5")),
        ("**18**", 18),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac34", Fraction(-3, 4)),
        ("1.2e3", 1200),
        ("1.2 \\times 10^{-3}", Fraction("0.0012")),
        ("50\\%", 50),
        ("x=5", 5),
        ("5 km", 5),
    ],
)
def test_a_number_is_read_exactly_however_it_is_written(text, value):
    assert numeric.number(text).value == value


@pytest.mark.parametrize("text", ["", "none", "v2", "12 or 13", "12, 13", "either 12 or maybe 13", "3/0", "9" * 99])
def test_no_number_or_several_to_choose_from_is_none(text):
    assert numeric.number(text) is None


def test_a_list_is_not_read_as_thousands():
    assert [n.value for n in numeric.numbers("1,2,3 and 1,23")] == [1, 2, 3, 1, 23]


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("12 + 30 = 42", "42", 1),
        ("12 + 30 = 43", "42", 0),
        ("The answer is 42, as 12 + 30 is 42.", 42, 1),
        ("The answer is 42.\nI took 12 and 30 together.", 42, 1),
        ("#### 42\nthat was step 3", "9 + 33 = 42\n#### 42", 1),
        ("I get \\boxed{42} from 30.", "42", 1),
        ("\\boxed{41} no, \\boxed{42}", "42", 0),
        ("#### 41\n#### 42", "42", 0),
        ("41 or 42", "42", 0),
        ("42 = 42", "42", 1),
        ("0.333", "1/3", 1),
        ("0.33", "1/3", 0),
        ("0.334", "1/3", 0),
        ("1/3", "0.3333", 1),
        ("42.001", "42", 0),
        ("50%", "0.5", 1),
        ("50", "50%", 1),
        ("5", "50%", 0),
        ("42.0", 42, 1),
        ("42", ["41", "42"], 1),
        ("<think>41? 40?</think>42", "42", 1),
    ],
)
def test_numeric_scores_the_final_number(text, answer, value):
    assert score("numeric", text, answer).value == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("Paris", "Paris", 1),
        ("  Paris\n", "Paris", 1),
        ("It may be Paris", "Paris", 0),
        ("The answer is: **Paris**.", "Paris", 1),
        ("paris", "Paris", 0),
        ("Answer: Paris\nAnswer: Rome", "Paris", 0),
        ("\\boxed{f(\\{x\\})}", "f(\\{x\\})", 1),
        ("e\u0301te\u0301", "\u00e9t\u00e9", 1),
        ("", "Paris", 0),
        ("the answer is: 7.", "the answer is: 7.", 1),
    ],
)
def test_exact_scores_the_final_text(text, answer, value):
    assert score("exact", text, answer).value == value


def test_an_answer_that_was_cut_off_is_worth_nothing_even_if_it_matches():
    assert score("numeric", "12", "12", finished=False) == CUT
    assert shares([CUT, score("numeric", "12", "12")]) == {"cut": 0.5, "scored": 0.5}


def test_boxes_are_balanced_and_an_open_one_is_none():
    assert boxed("\\boxed{\\frac{1}{2}} and \\boxed{3") == ["\\frac{1}{2}"]
    assert final_answers("no mark at all ") == ["no mark at all"]


def test_another_field_may_hold_the_reference():
    assert open_scorer("exact:target")([Answer("", "a", row={"target": "a"})])[0].value == 1


def test_a_row_without_its_reference_is_refused_by_name():
    with pytest.raises(
        DataError, match=r"row 3 of mine.jsonl: the field 'answer', .* is missing; did you mean 'Answer'"
    ):
        open_scorer("exact").check({"Answer": "x"}, "row 3 of mine.jsonl")
    with pytest.raises(DataError, match="row 3: 'answer' is 'twelve', which states no number; mend it"):
        open_scorer("numeric").check({"answer": "twelve"}, "row 3")
    with pytest.raises(DataError, match="'answer' is True; make it a text"):
        open_scorer("exact").check({"answer": True}, "row 3")


def test_an_unknown_reward_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'numerc' is no reward; one begins with exact, numeric.*mean 'numeric'"):
        open_scorer("numerc")
