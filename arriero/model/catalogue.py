"""Shapes by name: every published size, and small shapes to pretrain from scratch.

Sizes and parameter counts follow the papers (Llama 1: arXiv 2302.13971, Llama 2: 2307.09288, Llama 3: 2407.21783,
Qwen3: 2505.09388) and the model cards.
"""

from __future__ import annotations

from arriero.io.paths import lies_here
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.scaling import Llama3Scaling


def _llama1(dim: int, n_layers: int, n_heads: int, ffn_dim: int, eps: float = 1e-5) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_heads, ffn_dim, 32_000, 2048, norm_eps=eps)


def _llama3(
    dim: int, n_layers: int, n_heads: int, ffn_dim: int, factor: float | None, tied: bool = False
) -> LlamaConfig:
    scaling = None if factor is None else Llama3Scaling(factor)
    context = 8192 if factor is None else 131_072
    return LlamaConfig(
        dim, n_layers, n_heads, 8, ffn_dim, 128_256, context,
        rope_theta=500_000.0, rope_scaling=scaling, tied_embeddings=tied,
    )  # fmt: skip


def _smollm2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, theta: float) -> LlamaConfig:
    return LlamaConfig(
        dim, n_layers, n_heads, n_kv_heads, ffn_dim, 49_152, 8192, rope_theta=theta, tied_embeddings=True
    )


def _qwen3(dim: int, n_layers: int, n_heads: int, ffn_dim: int, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        dim, n_layers, n_heads, 8, ffn_dim, 151_936, 32_768,
        norm_eps=1e-6, rope_theta=1e6, tied_embeddings=tied, head_dim=128,
    )  # fmt: skip


def _small(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, vocab_size: int, context: int
) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_kv_heads, ffn_dim, vocab_size, context, tied_embeddings=True)


PUBLISHED: dict[str, LlamaConfig] = {
    "llama1-7b": _llama1(4096, 32, 32, 11_008, eps=1e-6),
    "llama1-13b": _llama1(5120, 40, 40, 13_824),
    "llama1-33b": _llama1(6656, 60, 52, 17_920),
    "llama1-65b": _llama1(8192, 80, 64, 22_016),
    "llama2-7b": LlamaConfig(4096, 32, 32, 32, 11_008, 32_000, 4096, norm_eps=1e-6),
    "llama2-13b": LlamaConfig(5120, 40, 40, 40, 13_824, 32_000, 4096),
    "llama2-70b": LlamaConfig(8192, 80, 64, 8, 28_672, 32_000, 4096),
    "llama3-8b": _llama3(4096, 32, 32, 14_336, None),
    "llama3-70b": _llama3(8192, 80, 64, 28_672, None),
    "llama3.1-8b": _llama3(4096, 32, 32, 14_336, 8.0),
    "llama3.1-70b": _llama3(8192, 80, 64, 28_672, 8.0),
    "llama3.1-405b": _llama3(16_384, 126, 128, 53_248, 8.0),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, tied=True),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536, 100_000.0),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, 130_000.0),
}

QWEN3: dict[str, LlamaConfig] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
}
"""The dense models of Qwen3; the context is what they were trained at (section 3.2)."""

LADDER: dict[str, LlamaConfig] = {
    "1m": _small(128, 4, 4, 2, 384, 2048, 1024),
    "10m": _small(320, 6, 5, 5, 896, 8192, 1024),
    "30m": _small(512, 8, 8, 4, 1536, 8192, 1024),
    "qwen3-30m": Qwen3Config(512, 8, 8, 4, 1536, 8192, 1024, norm_eps=1e-6, tied_embeddings=True),
    "124m": _small(768, 12, 12, 4, 2816, 32_768, 2048),
    "350m": _small(1024, 28, 16, 4, 2816, 32_768, 2048),
    "1b": _small(2048, 16, 32, 8, 8192, 32_768, 4096),
}
"""Our own small shapes to pretrain from nothing, named by their size.

In a run the vocabulary is the tokenizer's, and the context that of the longest row."""

SHAPES = {**LADDER, **PUBLISHED, **QWEN3}


def named_shape(name: str) -> LlamaConfig | None:
    """The known shape of that name; None where there is none, or where the name is an existing path, with a notice."""
    return None if name not in SHAPES or lies_here(name, "the shape") else SHAPES[name]
