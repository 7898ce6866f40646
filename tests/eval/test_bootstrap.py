import math
from itertools import permutations

import numpy as np
import pytest

from arriero.eval.bootstrap import Ratio, difference, interval, mean


def test_the_interval_of_a_mean_is_the_one_that_the_normal_distribution_gives():
    values = np.random.default_rng(11).normal(5.0, 2.0, 997)
    found = interval(mean(list(values)), resamples=4000, seed=3)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * 2 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * 2 * half)


def test_a_ratio_weighs_rows_by_their_denominators():
    bits_per_token = Ratio(np.array([10.0, 2.0]), np.array([5.0, 1.0]))
    assert bits_per_token.value == pytest.approx(12 / 6)
    assert Ratio(bits_per_token.over, bits_per_token.under, exponent=True).value == pytest.approx(4.0)


def test_draws_and_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(19)
    over, under = rng.gamma(2, 30, 113), rng.integers(5, 40, 113).astype(float)
    theirs = stats.bootstrap(
        (over, under), lambda o, u, axis: o.sum(axis) / u.sum(axis), paired=True, vectorized=True, n_resamples=300,
        method="percentile", rng=np.random.default_rng(3), batch=1,
    )  # fmt: skip
    ours = Ratio(over, under)
    np.testing.assert_allclose(ours.draws(300, seed=3), theirs.bootstrap_distribution, rtol=1e-12)
    found = interval(ours, 300, seed=3)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval))


def test_pairing_removes_the_noise_that_two_models_share():
    hard = np.random.default_rng(13).normal(0.0, 10.0, 113)
    before, after = mean(list(hard)), mean(list(hard + 0.5))
    found = difference(before, after, resamples=500, seed=7)
    assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))
    alone = interval(after, resamples=500, seed=7)
    assert alone.high - alone.low > 1


def test_samples_of_different_size_are_compared_unpaired():
    rng = np.random.default_rng(17)
    before, after = mean(list(rng.normal(0, 1, 211))), mean(list(rng.normal(0, 1, 223)))
    found = difference(before, after, resamples=4000, seed=0)
    half = 1.96 * np.sqrt(before.over.var() / 211 + after.over.var() / 223)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    ratio = mean(list(np.random.default_rng(5).normal(size=31)))
    assert interval(ratio, 200, seed=1) == interval(ratio, 200, seed=1) != interval(ratio, 200, seed=2)


def test_one_row_alone_has_no_interval():
    found = interval(mean([3.0]), 200, seed=1)
    assert (found.value, found.low, found.high) == (3.0, None, None)
    assert difference(mean([1.0]), mean([3.0]), 200, seed=1).sign == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_interval_and_no_sign(bad):
    good, broken = mean([1.0, 2.0, 3.0]), mean([1.0, bad, 3.0])
    for found in (interval(broken, 200, seed=1), *(difference(*p, 200, 1) for p in permutations((good, broken)))):
        assert not math.isfinite(found.value) and found.low is found.high is None and found.sign == 0
    assert (good.n_bad, broken.n_bad) == (0, 1)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    huge = Ratio(np.array([3e5, 4e5]), np.array([7.0, 11.0]), exponent=True)
    assert huge.value == math.inf and interval(huge, 200, seed=1).low is None


def test_rows_without_bytes_are_no_row_of_their_own():
    ratio = Ratio(np.array([3.0, 5.0]), np.array([0.0, 2.0]))  # a draw may take the first row twice
    found = interval(ratio, 200, seed=1)
    assert found.value == 4.0 and found.low <= 4.0 <= found.high
    assert math.isnan(Ratio(np.zeros(2), np.zeros(2)).value)


@pytest.mark.parametrize(("change", "sign"), [(0.0, 0), (0.5, 1), (-0.5, -1)])
def test_a_tie_has_no_sign(change, sign):
    rows = [float(i % 5) for i in range(37)]
    assert difference(mean(rows), mean([row + change for row in rows]), 200, seed=3).sign == sign
    mixed = [row + (0.5 if i % 2 else -0.5) for i, row in enumerate(rows)]
    assert difference(mean(rows), mean(mixed), 200, seed=3).sign == 0
