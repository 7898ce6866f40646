"""Losses of learning from preferences, on tensors alone: each takes a number for each answer and returns a loss a pair.

A *ratio* is log pi(y | x) - log pi_ref(y | x) of an answer y to x: how much more probable the policy has made it than
its reference. Summed over the answer's tokens it is the implicit reward over beta (arXiv 2305.18290, equation 5).
`per_token` divides by the answer's length, for the losses whose papers compare answers so.

    loss        of                               reference     paper
    dpo         ratios                           yes           2305.18290 (per token: Tulu 3, 2411.15124, section 5.1)
    ipo         ratios per token                 yes           2310.12036
    kto         one ratio and whether it is good yes           2402.01306
    simpo       log-probabilities per token      no            2405.14734
    orpo        log-probabilities per token      no            2403.07691

Whoever sums them divides by the pairs (kto: answers) of the whole global batch, so that accumulation is exact.
Shapes: m pairs, n answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """sums [n] over the tokens of answers, divided by how many those are, [n]; one of no token gives 0."""
    return sums / lengths.clamp(min=1)


def dpo(better: Tensor, worse: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (r_w - r_l)), [m], of ratios r (arXiv 2305.18290, equation 7).

    beta: how strongly the policy is held to its reference. smoothing: the share of labels that are wrong (conservative
    DPO, section 3 of "A note on DPO with noisy preferences", Mitchell 2023).
    """
    x = beta * (better - worse)
    return -F.logsigmoid(x) * (1 - smoothing) - F.logsigmoid(-x) * smoothing


def ipo(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """((r_w - r_l) - 1 / (2 beta))^2, [m], of ratios per token (arXiv 2310.12036, equation 17; tau is beta here).

    The paper writes sums; that ratios are per token is its authors' word to TRL, whose loss this is too.
    """
    return (better - worse - 1 / (2 * beta)).square()


def kto(
    ratio: Tensor, good: Tensor, reference_point: Tensor, beta: float, good_weight: float = 1.0, bad_weight: float = 1.0
) -> Tensor:
    """1 - sigmoid(beta (r - z)) of good answers and 1 - sigmoid(beta (z - r)) of bad ones, weighted, [n].

    (arXiv 2402.01306, equation 7.) reference_point: z, the KL divergence of the policy from its reference, at least 0,
    estimated by answers to other prompts; no gradient flows through it. good: [n], true or false.
    """
    x = beta * (ratio - reference_point.detach())
    return torch.where(good, good_weight * torch.sigmoid(-x), bad_weight * torch.sigmoid(x))


def simpo(better: Tensor, worse: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (p_w - p_l) - gamma), [m], of log-probabilities p per token (arXiv 2405.14734, equation 6)."""
    return -F.logsigmoid(beta * (better - worse) - gamma)


def orpo(better: Tensor, worse: Tensor) -> Tensor:
    """-log sigmoid(log odds_w - log odds_l), [m], of log-probabilities p per token, odds = e^p / (1 - e^p).

    The second term of arXiv 2403.07691, equation 6, whose first is the cross-entropy of the better answer.
    """
    return -F.logsigmoid(better - worse - (_log1mexp(better) - _log1mexp(worse)))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without loss of digits near either end (Maechler 2012)."""
    near = x > -0.6931
    safe_near, safe_far = torch.where(near, x, -0.5), torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(safe_near)).clamp(min=1e-38).log(), torch.log1p(-safe_far.exp()))
