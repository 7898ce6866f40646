"""Policy losses against exact gradients, by enumeration of every answer of a policy with five tokens and two places.

The policy is a table of logits: 5 for the first token, 5 for the second after each first one. There are 25 answers, so
any expectation is a sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arriero.losses.advantages import batch_normalised, group_normalised, leave_one_out
from arriero.losses.policy import (
    cispo,
    clipped,
    dppo,
    kl_estimate,
    mismatch_weights,
    reinforce,
    sequence_clipped,
    token_weights,
    value_loss,
)

ANSWERS = torch.tensor(list(itertools.product(range(5), range(5))))  # [25, 2]
STATES = torch.stack((torch.zeros(25, dtype=torch.long), ANSWERS[:, 0] + 1), 1)


def table(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logprobs(logits: Tensor) -> Tensor:
    """Of both tokens of every answer, [25, 2]."""
    return logits.log_softmax(1)[STATES, ANSWERS]


REWARDS = torch.randn(25, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def exact(logits: Tensor, rewards: Tensor = REWARDS) -> Tensor:
    """The gradient of the expected reward."""
    logits = logits.clone().requires_grad_()
    (logprobs(logits).sum(1).exp() * rewards).sum().backward()
    assert logits.grad is not None
    return logits.grad


def expected(logits: Tensor, loss: Callable[[Tensor, Tensor], Tensor], sampler: Tensor | None = None) -> Tensor:
    """-d E[sum over tokens of loss(logp, old)], the answers drawn by `sampler` (None: the policy itself)."""
    logits = logits.clone().requires_grad_()
    old = logprobs(logits if sampler is None else sampler).detach()
    chance = old.sum(1).exp()
    (chance[:, None] * loss(logprobs(logits), old)).sum().backward()
    assert logits.grad is not None
    return -logits.grad


A = REWARDS[:, None].expand(25, 2)  # each token is credited with the answer's reward
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clipped": lambda logp, old: clipped(logp, old, A),
    "clip-higher": lambda logp, old: clipped(logp, old, A, 0.2, 0.28),
    "dual clip": lambda logp, old: clipped(logp, old, A, dual=3.0),
    "GSPO": lambda logp, old: sequence_clipped(
        logp.flatten(), old.flatten(), A.flatten(), torch.arange(25).repeat_interleave(2), torch.ones(50).double()
    ).view(25, 2),
    "CISPO": lambda logp, old: cispo(logp, old, A),
    "DPPO": lambda logp, old: dppo(logp, old, A),
    "DPPO, KL": lambda logp, old: dppo(logp, old, A, divergence="kl"),
    "REINFORCE": lambda logp, old: reinforce(logp, A),
}


@pytest.mark.parametrize("name", LOSSES)
def test_at_ratio_one_every_loss_has_the_exact_gradient_of_the_expected_reward(name: str) -> None:
    logits = table(1)
    torch.testing.assert_close(expected(logits, LOSSES[name]), exact(logits), rtol=0, atol=1e-12)


def test_of_another_policys_answers_the_first_token_is_weighted_as_it_has_to_be() -> None:
    """Within the bounds, r A is unbiased for a bandit (the second token's own ratio is not the answer's)."""
    logits, old = table(1, 0.05), table(2, 0.05)
    rewards = REWARDS.view(5, 5).mean(1, keepdim=True).expand(5, 5).flatten()  # of the first token alone
    a = rewards[:, None] * torch.tensor([1.0, 0.0], dtype=torch.float64)
    for loss in (
        lambda logp, old: clipped(logp, old, a, 0.5, 0.5),
        lambda logp, old: cispo(logp, old, a),
        lambda logp, old: dppo(logp, old, a, 0.9),
    ):
        found = expected(logits, loss, old)
        torch.testing.assert_close(found[0], exact(logits, rewards)[0], rtol=0, atol=1e-12)
    wrong = expected(logits, lambda logp, old: reinforce(logp, a), old)  # not corrected, so biased
    assert (wrong[0] - exact(logits, rewards)[0]).abs().max() > 1e-3


def by_groups(
    logits: Tensor, advantages: Callable[[Tensor, Tensor], Tensor], k: int, rewards: Tensor, per: int = 1
) -> Tensor:
    """-d of the expected loss of a batch of one group of k answers, over all of 25^k groups; `per`: divisor."""
    groups = torch.cartesian_prod(*[torch.arange(25)] * k).view(-1, k)
    logits = logits.clone().requires_grad_()
    logp = logprobs(logits).sum(1)
    chance = logp.detach()[groups].sum(1).exp()
    a = advantages(rewards[groups], torch.ones(groups.shape).double())
    (chance * (reinforce(logp[groups], a)).sum(1) / k).sum().backward()
    assert logits.grad is not None
    return -logits.grad


def test_leave_one_out_is_unbiased_and_the_groups_mean_scales_by_k_minus_one_over_k() -> None:
    logits = table(3)
    for k in (2, 3):
        found = by_groups(logits, leave_one_out, k, REWARDS)
        torch.testing.assert_close(found, exact(logits), rtol=0, atol=1e-12)
        found = by_groups(logits, lambda r, m: group_normalised(r, m, deviation=False), k, REWARDS)
        torch.testing.assert_close(found, exact(logits) * (k - 1) / k, rtol=0, atol=1e-12)


def test_dividing_by_the_deviation_changes_the_direction_unless_rewards_are_of_two_values_alike() -> None:
    logits = table(3)
    found = by_groups(logits, group_normalised, 3, REWARDS)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact(logits).flatten(), dim=0)
    assert 0.5 < cosine < 0.9999  # a biased gradient that still climbs


def test_an_answer_that_is_masked_is_in_no_mean_and_no_denominator() -> None:
    rewards, mask = torch.tensor([[1.0, 0.0, 0.0, 9.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    for function in (group_normalised, leave_one_out, batch_normalised):
        with_it, without = function(rewards, mask), function(rewards[:, :3], mask[:, :3])
        torch.testing.assert_close(with_it[:, :3], without)
        assert with_it[0, 3] == 0
    by_hand = torch.tensor([[2 / 3, -1 / 3, -1 / 3]]) / math.sqrt(1 / 3)
    torch.testing.assert_close(group_normalised(rewards[:, :3], mask[:, :3]), by_hand, atol=1e-5, rtol=0)
    torch.testing.assert_close(leave_one_out(rewards[:, :3], mask[:, :3]), torch.tensor([[1.0, -0.5, -0.5]]))


def test_groups_of_one_reward_have_no_advantage() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.1 + 0.2, 0.3, 0.3], [1.0, 0.0, 1.0]])
    mask = torch.ones(3, 3)
    for function in (group_normalised, leave_one_out):
        assert function(rewards, mask)[0].eq(0).all() and function(rewards, mask)[2].ne(0).all()
    whole = batch_normalised(rewards, mask)
    assert whole[0].eq(0).all()
    torch.testing.assert_close(whole[2].sum() + whole[1].sum(), torch.tensor(0.0), atol=1e-5, rtol=0)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_clipping_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.25, 5.0])
    a = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0, -1.0])
    logp, old = ratio.log(), torch.zeros(6)
    torch.testing.assert_close(clipped(logp, old, a), -torch.tensor([2.4, -3.0, 1.0, -1.6, 1.2, -5.0]))
    torch.testing.assert_close(clipped(logp, old, a, 0.2, 0.28), -torch.tensor([2.56, -3.0, 1.0, -1.6, 1.25, -5.0]))
    torch.testing.assert_close(clipped(logp, old, a, dual=3.0), -torch.tensor([2.4, -3.0, 1.0, -1.6, 1.2, -3.0]))


@pytest.mark.parametrize("dual", [0.0, 3.0])
def test_clipping_equals_its_plain_loop(dual: float) -> None:
    g = torch.Generator().manual_seed(0)
    logp, old, a = (torch.randn(211, generator=g) for _ in range(3))
    found = clipped(logp, old, a, 0.1, 0.3, dual)
    for t in range(211):
        r = math.exp(float(logp[t] - old[t]))
        gain = min(r * float(a[t]), min(max(r, 0.9), 1.3) * float(a[t]))
        if dual and a[t] < 0:
            gain = max(gain, dual * float(a[t]))
        assert float(found[t]) == pytest.approx(-gain, rel=1e-5)


def test_gspo_has_one_ratio_for_an_answer_and_passes_over_what_an_environment_wrote() -> None:
    logp = torch.tensor([0.3, -0.1, 5.0, 0.4, 0.2], requires_grad=True)
    old, a = torch.zeros(5), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    documents, mask = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    loss = sequence_clipped(logp, old, a, documents, mask, 0.5, 0.5) * mask
    torch.testing.assert_close(loss, torch.tensor([-math.exp(0.1)] * 2 + [0.0] + [math.exp(0.3)] * 2))
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-math.exp(0.1)] * 2 + [0.0] + [math.exp(0.3)] * 2))
    assert float(sequence_clipped(logp.detach(), old, a, documents, mask, 0.05, 0.05)[0]) == pytest.approx(-1.05)


def test_cispo_keeps_the_gradient_of_a_clipped_token_and_ppo_does_not() -> None:
    logp, old, a = torch.tensor([2.0], requires_grad=True), torch.zeros(1), torch.ones(1)
    [grad] = torch.autograd.grad(cispo(logp, old, a, high=0.5).sum(), logp)
    assert grad == pytest.approx(-1.5)
    [grad] = torch.autograd.grad(clipped(logp, old, a).sum(), logp)
    assert grad == 0


def test_dppo_masks_by_divergence_and_only_outward() -> None:
    old = torch.tensor([0.001, 0.5, 0.5, 0.5]).log()
    logp = torch.tensor([0.002, 0.7, 0.7, 0.3]).log()
    a = torch.tensor([1.0, 1.0, -1.0, -1.0])  # a rare token twice as likely is let through, a shift of 0.2 is not
    ratios = (logp - old).exp()
    for kind, threshold in (("tv", 0.15), ("kl", 0.05)):
        found = dppo(logp, old, a, threshold, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(found, -torch.tensor([1.0, 0.0, 1.0, 0.0]) * ratios * a)


def test_mismatch_weights_by_hand() -> None:
    old, sampled = torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3)
    torch.testing.assert_close(mismatch_weights(old, sampled), torch.tensor([1.0, 2.0, math.exp(-1)]))
    torch.testing.assert_close(mismatch_weights(old, sampled, "mask", 0.5, 5.0), torch.tensor([1.0, math.e, 0.0]))
    assert mismatch_weights(old, sampled, "none").tolist() == [1.0, 1.0, 1.0]


def test_token_weights_by_hand() -> None:
    documents, mask = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0.0, 1, 1, 1, 1, 1])
    counted = torch.tensor([1.0, 1.0, 0.0])  # the third answer was cut
    for over, weights, counts in (
        ("tokens", [0, 1, 1, 1, 0, 0], [2, 1, 0]),
        ("answers", [0, 0.5, 0.5, 1, 0, 0], [1, 1, 0]),
        ("longest", [0, 0.1, 0.1, 0.1, 0, 0], [1, 1, 0]),
    ):
        found = token_weights(mask, documents, counted, over, 10)  # type: ignore[arg-type]
        torch.testing.assert_close(found[0], torch.tensor(weights, dtype=torch.float32))
        assert found[1].tolist() == counts


def test_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0]), torch.tensor([2.0, 2.0])
    torch.testing.assert_close(value_loss(values, old, returns), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(value_loss(values, old, returns, 0.2), torch.tensor([1.3**2 / 2, 1.8**2 / 2]))


# -- KL ----------------------------------------------------------------------------------------------------------------


def kl_bias(kind: str, policy: Tensor, reference: Tensor) -> tuple[float, float]:
    """(mean of the estimate / KL, cosine of its expected gradient as a loss with KL's) of answers of one token.

    How docs/rl.md's table is made. A cosine of 0 stands for a gradient of 0.
    """
    logits = policy.clone().requires_grad_()
    logp = logits.log_softmax(0)
    kl = (logp.exp() * (logp - reference.log_softmax(0))).sum()
    [true] = torch.autograd.grad(kl, logits, retain_graph=True)
    p = logp.exp().detach()
    estimate = (p * kl_estimate(logp, reference.log_softmax(0), kind)).sum()  # type: ignore[arg-type]
    [found] = torch.autograd.grad(estimate, logits)
    cosine = 0.0 if found.norm() < 1e-12 else float(found @ true / (found.norm() * true.norm()))
    return float((estimate / kl).detach()), cosine


def test_which_kl_estimators_are_right_in_mean_and_which_in_gradient() -> None:
    policy, reference = table(4)[0], table(5)[0]
    mean, cosine = zip(*(kl_bias(kind, policy, reference) for kind in ("k1", "k2", "k3")), strict=True)
    assert mean[0] == pytest.approx(1) and mean[2] == pytest.approx(1) and abs(mean[1] - 1) > 0.05
    assert cosine[0] == 0 and cosine[1] == pytest.approx(1) and 0 < cosine[2] < 0.99


def test_k3_as_a_loss_has_the_gradient_of_the_reversed_kl() -> None:
    policy, reference = table(4)[0].requires_grad_(), table(5)[0]
    logp, ref = policy.log_softmax(0), reference.log_softmax(0)
    [found] = torch.autograd.grad((logp.exp().detach() * kl_estimate(logp, ref, "k3")).sum(), policy)
    [reversed_] = torch.autograd.grad((ref.exp() * (ref - policy.log_softmax(0))).sum(), policy)
    torch.testing.assert_close(found, reversed_)


def test_k1_in_the_reward_has_the_gradient_of_the_kl() -> None:
    policy, reference = table(4)[0].requires_grad_(), table(5)[0]
    logp, ref = policy.log_softmax(0), reference.log_softmax(0)
    [true] = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), policy, retain_graph=True)
    in_reward = reinforce(logp, -kl_estimate(logp, ref, "k1").detach())
    [found] = torch.autograd.grad((logp.exp().detach() * in_reward).sum(), policy)
    torch.testing.assert_close(found, true)
