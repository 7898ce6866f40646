"""Packing: nothing lost, nothing repeated, no row over capacity, hardly any padding, always the same."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.data.pack import one_each, pack
from arriero.errors import DataError

CAPACITY = 61
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=211)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook algorithm, one example at a time: what is left in each row."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in range(len(left)) if left[row] >= length]
        if fits:
            left[min(fits, key=lambda row: left[row])] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(0, 2**31), st.integers(0, 100))
def test_every_example_lies_in_exactly_one_row_and_no_row_is_over_capacity(lengths, seed, epoch):
    packing = pack(np.array(lengths, dtype=np.int64), CAPACITY, seed, epoch)
    rows = [packing.row(k).tolist() for k in range(len(packing))]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= CAPACITY for row in rows)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(0, 2**31))
def test_rows_are_filled_as_by_the_textbook_algorithm(lengths, seed):
    packing = pack(np.array(lengths, dtype=np.int64), CAPACITY, seed, 0)
    left = [CAPACITY - sum(lengths[i] for i in packing.row(k)) for k in range(len(packing))]
    assert sorted(left) == best_fit_decreasing(lengths, CAPACITY)


def test_a_row_that_fits_exactly_is_preferred():
    packing = pack(np.array([7, 6, 4, 3]), 10, seed=0, epoch=0)
    assert sorted(sorted(packing.row(k).tolist()) for k in range(len(packing))) == [[0, 3], [1, 2]]


def test_epochs_differ_but_have_equally_many_rows_and_repeat_exactly():
    lengths = np.random.default_rng(3).integers(1, CAPACITY, 997)
    packings = [pack(lengths, CAPACITY, 5, epoch) for epoch in range(5)]
    assert len({len(p) for p in packings}) == 1
    assert len({p.examples.tobytes() for p in packings}) == 5
    again = pack(lengths, CAPACITY, 5, 3)
    assert np.array_equal(again.examples, packings[3].examples) and np.array_equal(again.bounds, packings[3].bounds)
    assert not np.array_equal(pack(lengths, CAPACITY, 6, 3).examples, again.examples)


def test_the_order_is_the_same_on_every_machine():
    # Written down once: a change would break the resume of runs that are under way.
    packing = pack(np.array([3, 5, 2, 7, 11, 5, 2, 3]), 13, seed=17, epoch=1)
    assert [packing.row(k).tolist() for k in range(len(packing))] == EXPECTED


EXPECTED = [[0, 5, 7, 2], [1, 3], [6, 4]]


def test_companions_change_between_epochs():
    lengths = np.random.default_rng(0).integers(2, 19, 500)
    rows = [{tuple(sorted(p.row(k))) for k in range(len(p))} for p in (pack(lengths, 31, 0, e) for e in (0, 1))]
    assert len(rows[0] & rows[1]) < len(rows[0]) / 10


def test_without_packing_every_example_is_a_row_in_random_order():
    packing = one_each(29, seed=1, epoch=2)
    assert [len(packing.row(k)) for k in range(len(packing))] == [1] * 29
    assert sorted(packing.examples.tolist()) == list(range(29)) != packing.examples.tolist()


def test_padding_on_realistic_lengths_is_under_three_percent():
    # Log-normal with a long tail, as in the public instruction sets: medians of 130 to 600 tokens.
    for median, capacity in ((130, 1024), (250, 2048), (600, 2048)):
        lengths = np.clip(np.random.default_rng(7).lognormal(np.log(median), 0.9, 5000), 10, capacity).astype(int)
        packing = pack(lengths, capacity, 0, 0)
        assert 1 - lengths.sum() / (len(packing) * capacity) < 0.03


def test_a_million_examples_take_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, 1_000_000), 1, 2048).astype(int)
    start = time.process_time()
    packing = pack(lengths, 2048, 0, 0)
    assert time.process_time() - start < 10  # about 1.5 s
    assert np.bincount(packing.examples).max() == 1


@pytest.mark.parametrize("bad", [0, 14])
def test_an_example_that_fits_no_row_is_refused(bad):
    with pytest.raises(DataError, match=rf"an example of {bad} tokens does not fit a row of 1 to 13"):
        pack(np.array([3, bad]), 13, 0, 0)


def test_no_examples_make_no_rows():
    assert len(pack(np.array([], dtype=np.int64), 13, 0, 0)) == 0
