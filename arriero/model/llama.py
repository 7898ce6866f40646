"""The Llama decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU. All in one file.

Module and parameter names are those of the Hugging Face layout, so a state dict *is* a checkpoint and no
name map exists. Weights may be stored in a wider type than is computed in: each linear casts its weight to
the type of its input, and gradients come back in the stored type. Norm statistics and RoPE are fp32.
The file has no code for data, losses, LoRA or parallelism: those wrap the model from outside.

Sources: Llama 1 (arXiv 2302.13971, section 2.2), Llama 2 (2307.09288, A.2.1 for GQA), Llama 3 (2407.21783, 3.2).
Shapes: B batch, T tokens, D model width, H heads, K KV heads, h head width, F FFN width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arriero.model.config import LlamaConfig
from arriero.model.initial import initial_weight, whole
from arriero.model.layout import Attend, Layout, Rows
from arriero.model.linear import Linear
from arriero.model.rope import Rope, apply_rope, rope_tables

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one and the same where they are tied

HeadKind = Literal["logits", "score", "value"]
_HEAD_NAMES = {"logits": "lm_head", "score": "score", "value": "value"}  # Hugging Face's, but for the last


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension; the statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """y in `dtype`; None: in that of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(x.dtype) * normed.to(x.dtype)).to(dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key-value heads. The layout defines the mask (layout.py)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.dim, config.n_heads * config.head_dim)
        self.k_proj = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.v_proj = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.o_proj = Linear(config.n_heads * config.head_dim, config.dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, h], keys and values [B, T, K, h], before RoPE turns the first two."""
        heads = (*x.shape[:2], -1, self.head_dim)
        return self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)

    def forward(self, x: Tensor, *, rope: Rope, attend: Attend) -> Tensor:
        q, k, v = self.project(x)
        out = attend(apply_rope(q, *rope), apply_rope(k, *rope), v)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim)
        self.up_proj = Linear(config.dim, config.ffn_dim)
        self.down_proj = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: LlamaConfig, attention: type[Attention]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)
        self._recompute: dict[str, Any] | None = None

    def recompute(self, **how: Any) -> None:
        """Keep only the input, and run the layer again in the backward pass; how: arguments of torch's `checkpoint`."""
        self._recompute = how

    def forward(self, x: Tensor, rope: Rope, attend: Attend, dtype: torch.dtype | None = None) -> Tensor:
        """x: the residual stream. dtype: what the layer computes in; None: the type of x."""
        if self._recompute is None:
            return self._layer(x, rope, attend, dtype)
        again: Tensor = checkpoint(self._layer, x, rope, attend, dtype, use_reentrant=False, **self._recompute)
        return again

    def _layer(self, x: Tensor, rope: Rope, attend: Attend, dtype: torch.dtype | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, dtype=dtype), rope=rope, attend=attend)
        return x + self.mlp(self.post_attention_layernorm(x, dtype=dtype))


class Decoder(nn.Module):
    """Token ids [B, T] -> final hidden states [B, T, D]. The trunk under every head (logits, reward, value)."""

    def __init__(self, config: LlamaConfig, attention: type[Attention]) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: the type that the embeddings are stored in
        self.residual_dtype: torch.dtype | None = None  # None: the compute type
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """tokens: ids [B, T]. layout: their positions and attention; None: each row is one document."""
        layout = Rows.of(tokens) if layout is None else layout
        rope = rope_tables(self.config, layout.positions)
        x = self.embed_tokens(tokens).to(self.compute_dtype).to(self.stream_dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, rope, layout.attention(layer), self.compute_dtype)
        return self.norm(x)

    @property
    def stream_dtype(self) -> torch.dtype | None:
        """The type of the hidden states between blocks, and of those returned; None: that of the embeddings."""
        return self.residual_dtype or self.compute_dtype

    def compute_like(self, other: Decoder) -> None:
        """Compute in the types that `other` does."""
        self.compute_dtype, self.residual_dtype = other.compute_dtype, other.residual_dtype


class Llama(nn.Module):
    """The decoder with a head: token ids [B, T] -> logits [B, T, V], or a score or a value of each token [B, T, 1].

    Training never calls `forward`: it takes `model(tokens)` from the decoder and lets the chunked loss apply
    `head.weight` at trained positions only (see losses/lm.py). A relative is a subclass in a file of its own
    (qwen3.py); `build.py` chooses by the type of the config.
    """

    attention: type[Attention] = Attention

    def __init__(self, config: LlamaConfig, head: HeadKind = "logits") -> None:
        super().__init__()
        self.config, self.head_kind = config, head
        self.model = Decoder(config, self.attention)
        self.set_head(Linear(config.dim, config.vocab_size if head == "logits" else 1))
        self.tie_weights()

    @property
    def head(self) -> Linear:
        """What turns hidden states into outputs; its weight's name is that of its kind (`lm_head.weight`)."""
        head: Linear = getattr(self, _HEAD_NAMES[self.head_kind])
        return head

    @property
    def head_weight(self) -> Tensor:
        """The head's weight in the compute type, as the inference engine holds it, whatever type it is stored in."""
        return self.head.weight.to(self.model.compute_dtype)

    def set_head(self, module: nn.Module) -> None:
        """Put another module in the head's place."""
        self.add_module(_HEAD_NAMES[self.head_kind], module)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding matrix."""
        return self.config.tied_embeddings and self.head_kind == "logits"

    def tie_weights(self) -> None:
        """Make the head the embedding matrix where it is, and both are here (again after `to_empty`)."""
        if self.tied and isinstance(self.model.embed_tokens, nn.Embedding):
            self.head.weight = self.model.embed_tokens.weight

    def set_compute_dtype(self, dtype: torch.dtype, residual: torch.dtype | None = None) -> Self:
        """Compute activations and matmuls in `dtype`, whatever type the weights are stored in.

        residual: a wider type for the sum that blocks add to, and for the final hidden states and so the logits: where
        nothing is rounded between layers, as in the inference engine. None: `dtype`.
        """
        self.model.compute_dtype, self.model.residual_dtype = dtype, residual
        return self

    def forward(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """The head's outputs in the compute type; arguments as in `Decoder.forward`."""
        return self.head(self.model(tokens, layout))

    @torch.no_grad()
    def init_weights(self, std: float = 0.02, seed: int = 0, *, depth_scaled: bool = False) -> Self:
        """Fill all parameters with their first values, as `initial_weight` has them."""
        depth = self.config.n_layers if depth_scaled else None
        for name, p in self.named_parameters():
            p.copy_(initial_weight(name, p.shape, whole(p.shape), seed=seed, std=std, depth_scaled=depth))
        return self

    @property
    def device(self) -> torch.device:
        """The device of the embeddings."""
        return self.model.embed_tokens.weight.device
