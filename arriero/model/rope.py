"""Rotary position embeddings (arXiv 2104.09864), scaled for longer texts where the config says so.

Tables are computed in fp32 from the positions of each forward, once for all layers: a few thousand
sines against millions of multiplications, and no buffer that a dtype change could silently round.

Shapes: B batch, T tokens, H heads, h head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arriero.model.config import LlamaConfig
from arriero.model.scaling import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

Rope = tuple[Tensor, Tensor]
"""cos and sin of position x frequency, fp32 [B, T, 1, h/2]."""


def rope_frequencies(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """Return the angular frequencies f_i = theta^(-2i/h), fp32 [h/2], with the config's scaling.

    Source: arXiv 2104.09864 eq. 15; scaling as each kind in scaling.py says.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    match config.rope_scaling:
        case Llama3Scaling() as s:
            turns = s.original_context * frequencies / (2 * math.pi)  # L/w: rotations within the original context
            keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        case YarnScaling() as s:
            first, last = _yarn_range(s, config)
            index = torch.arange(config.head_dim // 2, dtype=torch.float32, device=device)
            keep = 1 - (index - first) / (last - first if first != last else 0.001)
        case LinearScaling() as s:
            return frequencies / s.factor
        case _:  # none, and dynamic within the context
            return frequencies
    keep = keep.clamp(0.0, 1.0)  # 1 keeps the frequency, 0 divides it by the factor
    return (1 - keep) * frequencies / s.factor + keep * frequencies


def _yarn_range(s: YarnScaling, config: LlamaConfig) -> tuple[float, float]:
    """Indices of the last frequency that YaRN keeps and of the first that it divides in full.

    Frequency i turns L theta^(-2i/h) / (2 pi) times within the original context L; solved for i.
    """

    def index(turns: float) -> float:
        turned = s.original_context / (turns * 2 * math.pi)
        return config.head_dim * math.log(turned) / (2 * math.log(config.rope_theta))

    first, last = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    return max(first, 0), min(last, config.head_dim - 1)


def rope_attention(config: LlamaConfig) -> float:
    """What sines and cosines are multiplied by: YaRN's attention factor, else 1."""
    return config.rope_scaling.attention_factor if isinstance(config.rope_scaling, YarnScaling) else 1.0


def rope_tables(config: LlamaConfig, positions: Tensor) -> Rope:
    """Return cos and sin of position x frequency, fp32 [B, T, 1, h/2], for positions [B, T].

    Raises ConfigError for positions that the scaling does not reach: `LlamaConfig.check_length`.
    """
    if isinstance(config.rope_scaling, DynamicScaling) and positions.numel():
        config.check_length(int(positions.max()) + 1)
    angles = positions.float()[..., None] * rope_frequencies(config, positions.device)
    cos, sin, attention = angles.cos()[:, :, None], angles.sin()[:, :, None], rope_attention(config)
    return (cos, sin) if attention == 1 else (cos * attention, sin * attention)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head of x [B, T, H, h] (Hugging Face's order), in fp32; keeps x's dtype."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
