"""Losses of reinforcement learning from a model's own answers, one small function each, on tensors alone.

All take log-probabilities of the tokens that were sampled: `logp` of the policy that is trained (with gradient), `old`
of the policy as it was when it sampled. `advantages`: how much better than expected each token, or its answer, was
(advantages.py). With `ratio` r = exp(logp - old), which is 1 at the first update, each returns the loss of each token
[N]; whoever sums them chooses the denominator (`token_weights`), and no mask is needed: a token with weight 0 is in no
sum. docs/rl.md says which to choose, and prints how biased each gradient is, measured by enumeration.

At r = 1 the gradient of each of them is that of REINFORCE, -A d logp (arXiv 1992 Williams): they differ in what they do
when the policy has moved away from the one that sampled.

Shapes: N tokens of answers laid end to end, n answers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# -- policy gradients --------------------------------------------------------------------------------------------------


def clipped(
    logp: Tensor, old: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2, dual: float = 0.0
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), [N]: PPO's clipped surrogate (arXiv 1707.06347, equation 7).

    high > low: clip-higher, which lets rare tokens grow (DAPO, 2503.14476, section 3.1: 0.2 and 0.28).
    dual: at least dual x A where A < 0, so that a token that became very likely does not dominate (1912.09729, section
    3.3, which has 3); 0: not.
    """
    ratio = (logp - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual * advantages), gain)
    return -gain


def sequence_clipped(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    documents: Tensor,
    mask: Tensor,
    low: float = 3e-4,
    high: float = 4e-4,
) -> Tensor:
    """PPO's surrogate with one ratio for a whole answer, the geometric mean of its tokens': GSPO (2507.18071, 4.1-4.2).

        s = exp(mean over the answer's tokens of (logp - old))        loss of a token: -min(s A, clip(s) A)

    The token's own log-probability carries the gradient of s (section 4.3), so advantages may differ within an answer.
    documents: the number of each token's answer, int64 [N]; mask: 1 for tokens of answers. low, high: the paper's.
    """
    n = int(documents.max()) + 1 if len(documents) else 0
    sums = logp.new_zeros(n).index_add(0, documents, ((logp - old) * mask).detach())
    counts = logp.new_zeros(n).index_add(0, documents, mask)
    mean = (sums / counts.clamp(min=1))[documents]
    return clipped(logp, logp.detach() - mean, advantages, low, high)


def cispo(logp: Tensor, old: Tensor, advantages: Tensor, low: float = 1.0, high: float = 4.0) -> Tensor:
    """-sg(clip(r, 1 - low, 1 + high)) A logp, [N]: CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    The weight is clipped, not the token: every token keeps a gradient. low 1: no lower bound, as in the paper, which
    leaves `high` out; ours.
    """
    weight = (logp - old).exp().clamp(1 - low, 1 + high).detach()
    return -weight * advantages * logp


def dppo(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    threshold: float = 0.1,
    divergence: Literal["tv", "kl"] = "tv",
) -> Tensor:
    """-M r A, [N]: DPPO (arXiv 2602.04879): a token is masked where it would drive policies apart that are apart.

    M = 0 where r moves on in A's direction (r > 1 for A > 0, r < 1 for A < 0) and the divergence of the two-way
    distributions (this token, any other) is above `threshold`: total variation |p_old - p|, or
    KL(old, new) = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p)). threshold: ours.
    """
    ratio = (logp - old).exp()
    with torch.no_grad():
        p, q = logp.exp(), old.exp()
        apart = (q - p).abs()
        if divergence == "kl":
            rest_q, rest_p = (1 - q).clamp(min=1e-9), (1 - p).clamp(min=1e-9)
            apart = q * (old - logp) + rest_q * (rest_q.log() - rest_p.log())
        outward = torch.where(advantages > 0, ratio > 1, ratio < 1)
        kept = (~(outward & (apart > threshold))).to(logp.dtype)
    return -kept * ratio * advantages


def reinforce(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A logp, [N]: the plain policy gradient (Williams 1992), for RLOO and one update a batch."""
    return -advantages * logp


# -- what else is in a loss --------------------------------------------------------------------------------------------


def mismatch_weights(
    old: Tensor,
    sampled: Tensor,
    kind: Literal["none", "truncate", "mask"] = "truncate",
    low: float = 0.5,
    high: float = 2.0,
) -> Tensor:
    """Importance weights w = exp(old - sampled), trainer's log-probabilities over the sampler's, [N], no gradient.

    Both are of the same weights; kernels and number formats differ. truncate: min(w, high) (TIS: Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"; high 2). mask: w within [low, high], else 0, so
    that the token is left out (IcePop, arXiv 2510.18855, which has 0.5 and 5). none: 1.
    """
    weight = (old - sampled).exp().detach()
    if kind == "none":
        return torch.ones_like(weight)
    return weight.clamp(max=high) if kind == "truncate" else weight * ((weight >= low) & (weight <= high))


def token_weights(
    mask: Tensor, documents: Tensor, counted: Tensor, over: Literal["tokens", "answers", "longest"], longest: int = 1
) -> tuple[Tensor, Tensor]:
    """The weight of each token in a sum of losses [N], and what each answer adds to its denominator [n].

    tokens: every token counts alike over the batch (DAPO, arXiv 2503.14476, section 3.3). answers: every answer counts
    alike, as in GRPO (2402.03300, equation 3), where a token of a long answer weighs less. longest: the sum divided by
    answers x `longest`, a constant (Dr. GRPO, 2503.20783, section 3.1). mask: 1 for tokens that the policy chose.
    counted: 1 for each answer that counts [n]; the others are in neither numerator nor denominator.
    """
    lengths = torch.zeros_like(counted).index_add(0, documents, mask)
    weights = mask * counted[documents]
    if over == "tokens":
        return weights, lengths * counted
    each = lengths.clamp(min=1) if over == "answers" else torch.full_like(lengths, longest)
    return weights / each[documents], counted * (lengths > 0)


def kl_estimate(logp: Tensor, reference: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates of KL(policy, reference) at sampled tokens, [N], d = logp - reference (Schulman 2020).

    k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d. Of the policy's own samples k1 and k3 have the right mean. As a LOSS,
    k2's gradient is the one of the KL on the policy's samples; k1's has mean 0; k3's is that of the reversed KL
    (arXiv 2510.01555, 2512.21852; the table in docs/rl.md). In the REWARD, without gradient, k1 is the unbiased one.
    """
    d = logp - reference
    return d if kind == "k1" else d.square() / 2 if kind == "k2" else torch.exp(-d) - 1 + d


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float = 0.0) -> Tensor:
    """1/2 (V - R)^2 of each token, [N]; with `clip` the larger of that and the one of V kept within clip of the old V.

    The clipping of PPO's reference implementation (see arXiv 2005.12729, section 3, which finds little use in it).
    """
    plain = (values - returns).square()
    if clip:
        plain = torch.maximum(plain, (old + (values - old).clamp(-clip, clip) - returns).square())
    return plain / 2
