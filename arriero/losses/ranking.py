"""Losses of reward models, on tensors alone. Shapes: m pairs, n answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pairwise(better: Tensor, worse: Tensor, margins: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(s_w - s_l - margin), [m], of scores s (Llama 2, arXiv 2307.09288, equation 2).

    margins: how much higher the better one is to be, [m]; 0 is the Bradley-Terry model's likelihood.
    """
    return -F.logsigmoid(better - worse - margins)


def safety(scores: Tensor, safe: Tensor) -> Tensor:
    """-log sigmoid(s) of safe answers, -log sigmoid(-s) of unsafe ones, [n]; safe: true or false.

    Llama 2's auxiliary loss of its safety reward model (arXiv 2307.09288, A.3.3), whose formula is unpublished: this is
    the one under which sigmoid(s) is the probability of being safe, with which its threshold of 0.15 is compared.
    """
    return -F.logsigmoid(scores.where(safe, -scores))
