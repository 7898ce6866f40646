"""Rotary position embeddings (arXiv 2104.09864), with Llama 3.1's frequency scaling.

Tables are computed in fp32 from the positions of each forward, once for all layers: a few thousand
sines against millions of multiplications, and no buffer that a dtype change could silently round.

Shapes: B batch, T tokens, H heads, h head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arriero.model.config import LlamaConfig


def rope_frequencies(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """Return the angular frequencies f_i = theta^(-2i/h), fp32 [h/2], scaled where the config says so.

    Source: arXiv 2104.09864 eq. 15; scaling as in `RopeScaling`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    s = config.rope_scaling
    if s is None:
        return frequencies
    turns = s.original_context * frequencies / (2 * math.pi)  # L/w: rotations within the original context
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)  # 1 keeps the frequency, 0 divides it by the factor
    return (1 - smooth) * frequencies / s.factor + smooth * frequencies


def rope_tables(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position x frequency, fp32 [B, T, 1, h/2], for positions [B, T]."""
    angles = positions.float()[..., None] * rope_frequencies(config, positions.device)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head of x [B, T, H, h] (Hugging Face's order), in fp32; keeps x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
