"""How much better than expected an answer, or a token, was: what a policy gradient weighs log-probabilities by.

Answers to one prompt are a group, and judge each other (GRPO, RLOO, REINFORCE++); or a value model judges each token
(GAE). Nothing here has a gradient. An answer that is masked (cut by length, not scored) counts in no mean, deviation or
number of answers, and its advantage is 0; so is that of a group whose answers all have one reward.

Shapes: G groups (prompts), K answers of each; N tokens of answers laid end to end, n answers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_normalised(rewards: Tensor, mask: Tensor, *, deviation: bool = True, eps: float = 1e-6) -> Tensor:
    """(r - mean of the group) / (its deviation + eps), [G, K]; mask [G, K]: 1 for each answer that counts.

    GRPO (arXiv 2402.03300, section 4.1.2), the deviation over K - 1. deviation=False leaves the division out, which
    favours prompts with rare rewards (Dr. GRPO, 2503.20783, section 3).
    """
    n = mask.sum(1, keepdim=True)
    centred = (rewards - (rewards * mask).sum(1, keepdim=True) / n.clamp(min=1)) * mask
    if deviation:
        centred = centred / ((centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + eps)
    return centred * varied(rewards, mask)[:, None]


def leave_one_out(rewards: Tensor, mask: Tensor) -> Tensor:
    """r - mean of the OTHER answers of the group, [G, K]: RLOO (arXiv 2402.14740, section 2.3), unbiased.

    K / (K - 1) times `group_normalised` without deviation. An answer without others has advantage 0.
    """
    n = mask.sum(1, keepdim=True)
    centred = (rewards - (rewards * mask).sum(1, keepdim=True) / n.clamp(min=1)) * mask
    return centred * n / (n - 1).clamp(min=1) * varied(rewards, mask)[:, None]


def batch_normalised(rewards: Tensor, mask: Tensor, *, baseline: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards whitened over the whole batch, [G, K]: REINFORCE++ (arXiv 2501.03262, sections 3.1 and 3.2).

    baseline: take each group's mean off first ("REINFORCE++-baseline", for verifiable rewards); groups of one reward
    then count nowhere. Without, every answer counts.
    """
    counted = mask * varied(rewards, mask)[:, None] if baseline else mask
    if baseline:
        rewards = rewards - (rewards * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return whitened(rewards, counted, eps=eps)


def varied(rewards: Tensor, mask: Tensor) -> Tensor:
    """1 for each group with two different rewards among the answers that count, else 0; [G]. Others teach nothing."""
    inf = torch.full_like(rewards, torch.inf)
    largest, smallest = torch.where(mask > 0, rewards, -inf).amax(1), torch.where(mask > 0, rewards, inf).amin(1)
    return (largest > smallest).to(rewards.dtype)


def whitened(values: Tensor, mask: Tensor, *, shift: bool = True, eps: float = 1e-6) -> Tensor:
    """(x - mean) / (deviation + eps) over all entries whose mask is 1, 0 elsewhere; the deviation over n - 1.

    shift=False adds the mean back, which keeps the sign of rewards (InstructGPT's descendants whiten rewards so).
    """
    n = mask.sum().clamp(min=1)
    mean = (values * mask).sum() / n
    deviation = (((values - mean) * mask).square().sum() / (n - 1).clamp(min=1)).sqrt()
    scaled = (values - mean) / (deviation + eps)
    return (scaled if shift else scaled + mean) * mask


def overlong_penalty(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """0 up to `longest` - `margin` tokens, falling evenly to -1 at `longest`, [n]: DAPO (2503.14476, section 3.4).

    lengths: tokens of each answer. margin: DAPO's is a fifth of `longest`; 0 gives no penalty.
    """
    if margin <= 0:
        return torch.zeros(lengths.shape)
    return -((lengths - (longest - margin)) / margin).clamp(0, 1)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, documents: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and returns (advantage + value), [N] each: arXiv 1506.02438, section 3.

        delta_t = r_t + gamma V_t' - V_t        A_t = delta_t + gamma lam A_t'

    with t' the next token of the same answer that the POLICY chose (V and A are 0 behind the last): tokens that an
    environment wrote (mask 0) are passed over as if they were not there, so nothing that they say, or that the value
    model makes of them, changes an advantage. values: V before each token. documents: the number of each token's
    answer, ascending.
    """
    advantages = torch.zeros_like(values)
    after, value_after, last = 0.0, 0.0, -1
    own = mask.nonzero().squeeze(1).tolist()
    r, v, of = rewards.tolist(), values.tolist(), documents.tolist()
    for t in reversed(own):
        if of[t] != last:
            after, value_after, last = 0.0, 0.0, of[t]
        after = r[t] + gamma * value_after - v[t] + gamma * lam * after
        value_after = v[t]
        advantages[t] = after
    return advantages, (advantages + values) * mask
