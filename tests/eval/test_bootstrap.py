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
    assert not difference(mean([1.0]), mean([3.0]), 200, seed=1).excludes_zero
