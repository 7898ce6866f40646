"""Qwen3's dense decoder (arXiv 2505.09388, section 2): Llama's, with queries and keys normalised head by head.

QK-norm (arXiv 2302.05442, section 2) is an RMSNorm over the h values of each head of q and k, before RoPE, with one
weight [h] for all heads of q and one for all of k. It bounds what attention's softmax sees by |weight_q| |weight_k|
sqrt(h), however large the projections grow, so that higher learning rates stay stable. Price: two norms a layer over
(H + K) h values a token, 2 h parameters, and no step in C++ (infer/native_step.py): torch decodes.

Shapes: B batch, T tokens, D model width, H heads, K KV heads, h head width (given, not D / H).
"""

from __future__ import annotations

from torch import Tensor

from arriero.model.config import LlamaConfig
from arriero.model.llama import Attention, Llama, RMSNorm


class NormedAttention(Attention):
    """Llama's attention over normalised queries and keys."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, h] and keys [B, T, K, h] of norm |weight| sqrt(h), values [B, T, K, h]."""
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3(Llama):
    """Token ids [B, T] -> logits [B, T, V], as `Llama`; built from a `Qwen3Config`."""

    attention = NormedAttention
