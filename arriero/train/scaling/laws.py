"""Scaling laws as formulas, and the published ones: pure arithmetic.

Throughout C = 6 N D: training a model of N parameters on D tokens costs C FLOPs (Kaplan et al., arXiv 2001.08361,
section 2.1). Attention's products of scores and values are left out, as there; they add 12 T / (6 * 12 d) or so to a
block of width d on rows of T tokens: a few per cent for real models, a third for the smallest of a sweep on long rows.

C FLOPs, N parameters, D tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FLOPS_PER_PARAMETER = 6  # and token: 2 forward, 4 backward
NEAR = 0.03  # share by which the FLOPs of a run may exceed those of the next lower one of its budget
TOKENS_PER_PARAMETER = 20  # what Chinchilla (arXiv 2203.15556) came to: the ladder's


class Law(Protocol):
    """What to train with a budget."""

    def params(self, flops: float) -> float:
        """The best number of parameters."""

    def tokens(self, flops: float) -> float:
        """The tokens that it is trained on."""


@dataclass(frozen=True)
class PowerLaw:
    """D = coefficient C^exponent tokens, and so N = C / (6 D) parameters (Llama 3, arXiv 2407.21783, section 3.2.1)."""

    coefficient: float
    exponent: float

    def params(self, flops: float) -> float:
        """The best number of parameters."""
        return flops / (FLOPS_PER_PARAMETER * self.tokens(flops))

    def tokens(self, flops: float) -> float:
        """The tokens that it is trained on."""
        return self.coefficient * flops**self.exponent


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = floor + a / N^alpha + b / D^beta, nats a token (Chinchilla, arXiv 2203.15556, equations 2 to 4)."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        """The loss of a model of so many parameters after so many tokens."""
        return self.floor + self.a * params**-self.alpha + self.b * tokens**-self.beta

    def params(self, flops: float) -> float:
        """The best number: N = G (C/6)^(beta/(alpha+beta)), with G = (alpha a / (beta b))^(1/(alpha+beta))."""
        both = self.alpha + self.beta
        balance = (self.alpha * self.a / (self.beta * self.b)) ** (1 / both)
        return balance * (flops / FLOPS_PER_PARAMETER) ** (self.beta / both)

    def tokens(self, flops: float) -> float:
        """The tokens that it is trained on."""
        return flops / (FLOPS_PER_PARAMETER * self.params(flops))


PUBLISHED_LAWS: dict[str, Law] = {
    "llama3": PowerLaw(0.299, 0.537),
    "chinchilla": LossLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658),
    "chinchilla-2022": LossLaw(1.69, 406.4, 0.34, 410.7, 0.28),
}
"""Llama 3's (its figure's constants: the text's rounded ones miss its own answer), Chinchilla's data fitted anew by
Besiroglu et al. (arXiv 2404.10102), and the constants that Chinchilla printed, which ask for 90 tokens a parameter at
its own budget where its two other approaches, and the new fit, ask for about 20."""


MAX_LR = 6e-3  # what the law gives at 5e13 FLOPs; fitted from 1e17 up, it is too high far below (docs/log.md)


def suggested_lr(flops: float) -> float:
    """Peak learning rate for a run of so many FLOPs: 0.3118 C^-0.1250 (DeepSeek LLM, arXiv 2401.02954, section 3.1).

    At most MAX_LR.
    """
    return min(0.3118 * flops**-0.1250, MAX_LR)


def suggested_batch(flops: float) -> float:
    """Tokens in a global batch for a run of so many FLOPs, 0.2920 C^0.3271 (ibidem)."""
    return 0.2920 * flops**0.3271
