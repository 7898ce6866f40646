"""A cache of keys and values in blocks, and the layout of a step's tokens over it: those of many sequences at once.

The tokens of a step are rows of one token each, [n, 1], so that all linears see one matrix and a row may have an
adapter of its own (lora.py). Attention gathers the keys and values of a sequence from its blocks: once for all
sequences that have a single token in the step (padded to the longest), and once for each that has more. Price: that
copy, each step and layer; the C++ step reads the blocks where they lie.

Shapes: L layers, N blocks, S tokens of a block, n tokens of a step, s sequences, b blocks of the longest, K KV heads,
H heads, h head width, T' the most positions that a token sees.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.model.config import LlamaConfig
from arriero.model.layout import Attend


class PagedCache:
    """Keys and values [L, N * S, K, h]: position p of a sequence lies in slot p % S of its block p // S."""

    def __init__(
        self, config: LlamaConfig, n_blocks: int, block: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.n_layers, n_blocks * block, config.n_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.n_blocks, self.block = n_blocks, block

    def copy_block(self, source: int, target: int) -> None:
        """Let a block hold what another does, in all layers."""
        for x in (self.k, self.v):
            blocks = x.unflatten(1, (self.n_blocks, self.block))
            blocks[:, target] = blocks[:, source]


class PagedTokens:
    """A layout: each token sees the positions of its sequence up to its own, from the cache, to which all are written.

    positions: int64 [n]. sequences: int64 [n], rows of `tables` int64 [s, b], in runs. All on the CPU.
    """

    def __init__(self, cache: PagedCache, positions: Tensor, sequences: Tensor, tables: Tensor) -> None:
        device = cache.k.device
        block = cache.block
        self.positions = positions[:, None].to(device)
        self._written = (tables[sequences, positions // block] * block + positions % block).to(device)
        self._cache = cache
        self._parts: list[_Part] = []
        _, lengths = torch.unique_consecutive(sequences, return_counts=True)
        starts = lengths.cumsum(0) - lengths
        if len(alone := starts[lengths == 1]):
            self._parts.append(_Part(alone[:, None], positions, tables[sequences[alone]], block, device))
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if length > 1:
                rows = torch.arange(start, start + length)
                self._parts.append(_Part(rows[None], positions, tables[sequences[start : start + 1]], block, device))

    def attention(self, layer: int) -> Attend:
        """Attention over the cache of one layer, to which it writes."""
        return partial(self._attend, self._cache.k[layer], self._cache.v[layer])

    def _attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """keys, values: the layer's, [N * S, K, h]; q [n, 1, H, h], k and v [n, 1, K, h]; like q."""
        keys.index_copy_(0, self._written, k[:, 0].to(keys.dtype))
        values.index_copy_(0, self._written, v[:, 0].to(values.dtype))
        out = torch.empty_like(q)
        for part in self._parts:
            ours, theirs = (x[part.slots].transpose(1, 2).to(q.dtype) for x in (keys, values))  # [s, K, T', h]
            queries = q[:, 0][part.rows].transpose(1, 2)  # [s, H, T, h]
            found = F.scaled_dot_product_attention(queries, ours, theirs, attn_mask=part.mask, enable_gqa=True)
            out[part.rows, 0] = found.transpose(1, 2)
        return out


class _Part:
    """Sequences that have equally many tokens T in the step: `rows` [s, T] of it, `slots` [s, T'] of what they see."""

    def __init__(self, rows: Tensor, positions: Tensor, tables: Tensor, block: int, device: torch.device) -> None:
        at = positions[rows]
        seen = torch.arange(int(at.max()) + 1)
        mask = seen <= at[..., None]
        first = tables[:, :1] * block  # what pads is masked, but has to be a number: a slot that has been written
        slots = torch.where(mask[:, -1], tables[:, seen // block] * block + seen % block, first)
        self.rows, self.slots = rows.to(device), slots.to(device)
        self.mask = mask[:, None].to(device)
