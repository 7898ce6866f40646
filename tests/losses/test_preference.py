"""Losses of preferences, by hand: each from numbers whose sigmoid paper can give, and in its limits."""

import math

import pytest
import torch

from arriero.losses.preference import dpo, ipo, kto, orpo, per_token, simpo
from arriero.losses.ranking import pairwise, safety

LN3 = math.log(3)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(found: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, of(*expected), rtol=1e-6, atol=1e-9)


def test_dpo_is_the_log_of_three_quarters_where_the_scaled_difference_is_log_3():
    same(dpo(of(5 * LN3, -1), of(-5 * LN3, -1), beta=0.1), -math.log(3 / 4), math.log(2))
    same(dpo(of(LN3), of(0), beta=1.0, smoothing=0.25), -0.75 * math.log(3 / 4) - 0.25 * math.log(1 / 4))


def test_dpos_gradient_pushes_the_sides_apart_by_the_probability_of_error():
    better, worse = of(0.0).requires_grad_(), of(LN3).requires_grad_()
    dpo(better, worse, beta=1.0).sum().backward()
    same(better.grad, -3 / 4)
    same(worse.grad, 3 / 4)


def test_a_length_divides_and_an_answer_without_tokens_gives_nothing():
    same(per_token(of(-6, 0), torch.tensor([3, 0])), -2, 0)


def test_ipo_wants_a_difference_of_five_at_beta_a_tenth():
    same(ipo(of(4, 7), of(-1, 0), beta=0.1), 0, 4)


def test_kto_looks_at_good_and_bad_answers_from_the_same_reference_point():
    good = torch.tensor([True, False, True])
    z = of(2).requires_grad_()
    ratio = of(2 + 10 * LN3, 2 + 10 * LN3, 2).requires_grad_()
    loss = kto(ratio, good, z, beta=0.1, good_weight=4.0, bad_weight=2.0)
    same(loss.detach(), 4 / 4, 2 * 3 / 4, 4 / 2)
    loss.sum().backward()
    assert z.grad is None
    same(ratio.grad, -0.1 * 4 * 3 / 16, 0.1 * 2 * 3 / 16, -0.1 * 4 / 4)


def test_simpo_asks_for_a_gap_of_gamma_over_beta():
    same(simpo(of(-1), of(-2), beta=2.0, gamma=2.0), math.log(2))
    same(simpo(of(-1), of(-2), beta=2 + LN3, gamma=2.0), -math.log(3 / 4))


def test_orpo_compares_odds():
    # odds of 1/2 are 1, of 1/4 are 1/3: their ratio is 3
    same(orpo(of(math.log(1 / 2)), of(math.log(1 / 4))), -math.log(3 / 4))
    same(orpo(of(-0.7), of(-0.7)), math.log(2))


@pytest.mark.parametrize("p", [-1e-6, -1e-3, -0.69, -0.7, -30.0, -300.0])
def test_orpos_odds_keep_their_digits_from_certain_to_impossible(p):
    x = of(p).requires_grad_()
    orpo(x, of(-1.0)).sum().backward()
    odds_of_one = 1 / (math.e - 1)
    ratio = -math.expm1(p) * odds_of_one / math.exp(p) if p > -200 else math.inf  # odds(-1) / odds(p)
    # d/dp log odds = 1 / (1 - e^p), and -d log sigmoid(x) = -sigmoid(-x)
    same(x.grad, -(1 / (1 + 1 / ratio) if ratio > 0 else 0) / -math.expm1(p))
    single = torch.tensor([p], dtype=torch.float32).requires_grad_()
    orpo(single, torch.tensor([-1.0])).sum().backward()
    assert torch.isfinite(single.grad).all()


def test_a_margin_is_subtracted_from_the_difference_of_scores():
    same(pairwise(of(LN3), of(0)), -math.log(3 / 4))
    same(pairwise(of(3 + LN3, 1), of(0, 0), of(3, 1)), -math.log(3 / 4), math.log(2))


def test_the_safety_loss_takes_the_score_for_the_log_odds_of_being_safe():
    same(safety(of(LN3, LN3, 0), torch.tensor([True, False, False])), -math.log(3 / 4), -math.log(1 / 4), math.log(2))
