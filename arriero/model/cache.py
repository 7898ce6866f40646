"""Preallocated storage for the keys and values of past tokens.

One tensor holds all layers, so a step allocates nothing. Rows may hold different numbers of tokens:
prefill right-padded prompts, then set `lengths` to the true ones; what lies behind a row's length is
masked and later overwritten. Price: 2 * n_layers * n_kv_heads * head_dim * capacity values a row.

Shapes: L layers, B batch, K KV heads, S capacity, T new tokens, h head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.model.config import LlamaConfig


class KVCache:
    """Keys and values [L, B, K, S, h] of up to `capacity` tokens for each of `batch` rows."""

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.capacity = capacity

    def positions(self, n_tokens: int) -> Tensor:
        """Positions [B, T] of the next `n_tokens` tokens of each row; raises ValueError past the capacity."""
        end = int(self.lengths.max()) + n_tokens
        if end > self.capacity:
            raise ValueError(f"KV cache: {end} tokens do not fit its capacity of {self.capacity}; make a larger cache")
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, K, h] at `positions` [B, T]; return all keys and values so far, [B, K, S', h]."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer].transpose(1, 2)[rows, positions] = k.to(self.k.dtype)
        self.v[layer].transpose(1, 2)[rows, positions] = v.to(self.v.dtype)
        end = int(self.lengths.max()) + k.shape[1]
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` more in every row, after all layers have written them."""
        self.lengths += n_tokens
