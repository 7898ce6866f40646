"""The mixture: every beginning keeps the weights, and any row's source is a look-up."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.data.mix import LLAMA1, MAX_PERIOD, MixtureOrder, integer_weights
from arriero.errors import ConfigError

WEIGHTS = st.lists(st.integers(1, 97), min_size=1, max_size=9)


def named(weights: list[int]) -> dict[str, float]:
    return {f"source {i}": float(w) for i, w in enumerate(weights)}


def tijdeman(weights: list[int], n_rows: int) -> list[int]:
    """The published algorithm as it stands, in fractions: the slow twin."""
    k, total = len(weights), sum(weights)
    if k == 1:
        return [0] * n_rows
    slack = Fraction(1, 2 * k - 2)
    had, order = [0] * k, []
    for n in range(1, n_rows + 1):
        shares = [Fraction(w * n, total) for w in weights]
        due = [i for i in range(k) if shares[i] - had[i] >= slack]
        chosen = min(due, key=lambda i: (math.floor((had[i] + 1 - slack) * total / weights[i]), i))
        had[chosen] += 1
        order.append(chosen)
    return order


@settings(max_examples=150, deadline=None)
@given(WEIGHTS)
def test_after_any_number_of_rows_each_source_has_had_its_share_to_within_one_row(weights):
    schedule = MixtureOrder(named(weights))
    order = [schedule.source(n) for n in range(2 * schedule.period + 1)]
    for name, share in schedule.shares.items():
        had = np.cumsum([source == name for source in order])
        rows = np.arange(1, len(order) + 1)
        assert np.all(np.abs(had * share.denominator - rows * share.numerator) < share.denominator)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 19), min_size=1, max_size=6))
def test_the_order_is_that_of_the_published_algorithm(weights):
    whole = list(integer_weights(named(weights)).values())
    schedule = MixtureOrder(named(weights))
    found = [int(schedule.source(n).split()[1]) for n in range(2 * sum(whole))]
    assert found == tijdeman(whole, len(found))


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(0, 2**40))
def test_counts_and_positions_agree_with_each_other_at_any_row(weights, n):
    schedule = MixtureOrder(named(weights))
    assert sum(schedule.count(name, n) for name in schedule.names) == n
    name = schedule.source(n)
    assert schedule.count(name, n + 1) == schedule.count(name, n) + 1
    assert schedule.position(name, schedule.count(name, n)) == n


def test_decimal_weights_are_taken_as_written():
    assert integer_weights({"a": 0.3, "b": 0.1}) == {"a": 3, "b": 1}
    assert integer_weights({"a": 4.5, "none": 0, "b": 67}) == {"a": 9, "b": 134}
    assert integer_weights({"only": 1e-9}) == {"only": 1}


def test_llama_1s_mixture_comes_out_as_in_its_table():
    schedule = MixtureOrder({name: share for name, (share, _) in LLAMA1.items()})
    assert schedule.period == 200
    had = {name: schedule.count(name, 1000) for name in LLAMA1}
    assert had == {
        "commoncrawl": 670, "c4": 150, "github": 45, "wikipedia": 45, "books": 45, "arxiv": 25, "stackexchange": 20,
    }  # fmt: skip


def test_weights_that_no_short_period_has_are_rounded_by_less_than_one_part_in_a_hundred_thousand():
    weights = {"a": 1 / 3, "b": 2 / 7, "c": 1e-9, "d": 0.123456789}
    began = time.process_time()
    schedule = MixtureOrder(weights)
    assert time.process_time() - began < 2
    assert schedule.period <= MAX_PERIOD + len(weights)
    for name, weight in weights.items():
        assert abs(schedule.shares[name] - weight / sum(weights.values())) < 1e-5
    assert schedule.shares["c"] > 0


def test_the_order_is_the_same_on_every_machine():
    # Written down once, and followed by hand: a is due at row 1 (3/5 >= 1/2), b not before row 2 (4/5).
    assert "".join(MixtureOrder({"a": 0.6, "b": 0.4}).source(n) for n in range(10)) == "ababaababa"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"web": -0.1}, "the weight of 'web' is -0.1; give a number of 0 or more"),
        ({"web": math.inf}, "the weight of 'web' is inf"),
        ({"web": math.nan, "books": 1}, "the weight of 'web' is nan"),
        ({"web": 0, "books": 0}, r"no source has a weight above 0 \(sources: web, books\); give one of them 1"),
        ({}, r"no source has a weight above 0 \(sources: none\)"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        MixtureOrder(weights)
