"""Advantages by hand and against plain loops."""

from __future__ import annotations

import pytest
import torch

from arriero.losses.advantages import gae, overlong_penalty, whitened


def loop_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: a discounted sum of temporal differences."""
    deltas = [r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def test_gae_equals_its_definition_answer_by_answer() -> None:
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(24, generator=g), torch.randn(24, generator=g)
    documents = torch.tensor([0] * 7 + [1] * 11 + [2] + [3] * 5)
    advantages, returns = gae(rewards, values, torch.ones(24), documents, 0.97, 0.9)
    for d in range(4):
        mine = documents == d
        wanted = loop_gae(rewards[mine].tolist(), values[mine].tolist(), 0.97, 0.9)
        assert advantages[mine].tolist() == pytest.approx(wanted, abs=1e-5)
    torch.testing.assert_close(returns, advantages + values)


def test_gae_by_hand() -> None:
    advantages, returns = gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25]), torch.ones(2), torch.zeros(2).long())
    assert advantages.tolist() == pytest.approx([-0.25 + 0.95 * 0.75, 0.75])
    assert returns.tolist() == pytest.approx([0.25 + 0.95 * 0.75, 1.0])


def test_what_an_environment_wrote_leaves_advantages_bit_for_bit() -> None:
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(19, generator=g), torch.randn(19, generator=g)
    documents, mask = torch.tensor([0] * 12 + [1] * 7), torch.ones(19)
    mask[3:6] = mask[11] = mask[12] = 0
    before, _ = gae(rewards, values, mask, documents)
    other_rewards, other_values = rewards.clone(), values.clone()
    other_rewards[mask == 0], other_values[mask == 0] = 1e6, -1e6
    after, returns = gae(other_rewards, other_values, mask, documents)
    assert torch.equal(before, after) and before[mask == 0].eq(0).all() and returns[mask == 0].eq(0).all()
    own, _ = gae(rewards[mask > 0], values[mask > 0], torch.ones(14), documents[mask > 0])
    assert torch.equal(before[mask > 0], own)  # as if those tokens were not there


def test_whitening_by_hand() -> None:
    values, mask = torch.tensor([1.0, 2.0, 3.0, 100.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(whitened(values, mask, eps=0), torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(whitened(values, mask, shift=False, eps=0), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert torch.isfinite(whitened(torch.ones(3), torch.ones(3))).all()
    assert whitened(torch.ones(2), torch.zeros(2)).eq(0).all()


def test_overlong_penalty_by_hand() -> None:
    lengths = torch.tensor([10.0, 80.0, 90.0, 100.0, 120.0])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -1, -1])
    assert overlong_penalty(lengths, 100, 0).tolist() == [0] * 5
