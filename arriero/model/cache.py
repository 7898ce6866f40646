"""Preallocated storage for the keys and values of past tokens, and the layout of tokens that follow them.

One tensor holds all layers, so a step allocates nothing. Rows may hold different numbers of tokens:
prefill right-padded prompts, then set `lengths` to the true ones; what lies behind a row's length is
masked and later overwritten. Price: 2 * n_layers * n_kv_heads * head_dim * capacity values a row.

Shapes: L layers, B batch, K KV heads, S capacity, T new tokens, S' the most tokens of a row with them, h head width.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.model.config import LlamaConfig
from arriero.model.layout import Attend


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

    def layout(self, n_tokens: int) -> CachedTokens:
        """The next `n_tokens` tokens of each row; raises ValueError past the capacity.

        Their forward writes keys and values; `advance` counts them. What is not counted is overwritten.
        """
        end = int(self.lengths.max()) + n_tokens
        if end > self.capacity:
            raise ValueError(f"KV cache: {end} tokens do not fit its capacity of {self.capacity}; make a larger cache")
        return CachedTokens(self, n_tokens, end)

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` more in every row, after a forward has written them."""
        self.lengths = self.lengths + n_tokens


class CachedTokens:
    """A layout: T new tokens of each row, which see what the cache holds of the row and themselves."""

    def __init__(self, cache: KVCache, n_tokens: int, end: int) -> None:
        """end: S'."""
        self.cache, self.end = cache, end
        self.positions = cache.lengths[:, None] + torch.arange(n_tokens, device=cache.lengths.device)
        self._rows = torch.arange(len(cache.lengths), device=cache.lengths.device)[:, None]

    @cached_property
    def _mask(self) -> Tensor:
        """Which keys each new token sees, [B, 1, T, S']."""
        return torch.arange(self.end, device=self.positions.device) <= self.positions[:, None, :, None]

    def attention(self, layer: int) -> Attend:
        """Attention over the cache of one layer, to which it writes."""
        return partial(self._attend, self.cache.k[layer], self.cache.v[layer])

    def _attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """keys, values: the layer's, [B, K, S, h]; the others as in `Attend`."""
        for stored, new in ((keys, k), (values, v)):
            stored.transpose(1, 2)[self._rows, self.positions] = new.to(stored.dtype)
        keys, values = (x[:, :, : self.end].to(q.dtype) for x in (keys, values))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=self._mask, enable_gqa=True)
        return out.transpose(1, 2)
