"""Attention layouts: which tokens attend to which, as one value that the decoder is given with the tokens.

A layout has the position of each token in its document, from which the RoPE tables are computed once for all layers,
and gives each layer its attention function. The decoder knows nothing else of packing, caches or context parallelism:
another pattern (a sliding window) is another class with these two members.

    Rows            each row of a batch is one document                                     (here)
    Documents       documents lie end to end in one row, and may continue earlier ones      (here)
    PagedTokens     tokens of many sequences behind those that a cache in blocks holds      (paged.py)
    HeldDocuments   the part of a packed row that a context-parallel process holds          (distributed/context.py)

Documents that begin alike (a system prompt, the prompt of a preference pair or of a group of answers) share the
beginning: it is a document of its own, the *lead* of those that continue it, and is computed once. A lead may have a
lead. The mathematics is unchanged, since a causal model's states at a prompt do not depend on what follows.

Shapes: B batch, T tokens, N tokens of a packed row, H heads, K KV heads, h head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.model.attention import PackedOnCpu, Piece, PieceByPiece, pieces_of

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, T, H, h], k [B, T, K, h], v [B, T, K, h]) -> softmax(q k^T / sqrt(h)) v over what each token sees, like q."""


class Layout(Protocol):
    """The positions of tokens, and the attention of each layer."""

    @property
    def positions(self) -> Tensor:
        """Position of each token in its document, int64 [B, T]."""

    def attention(self, layer: int) -> Attend:
        """The attention of one layer, counted from 0."""


@dataclass(frozen=True, eq=False)
class Rows:
    """`batch` rows of `length` tokens, each row one document."""

    batch: int
    length: int
    device: torch.device

    @classmethod
    def of(cls, tokens: Tensor) -> Rows:
        """Those of ids [B, T]."""
        return cls(tokens.shape[0], tokens.shape[1], tokens.device)

    @property
    def positions(self) -> Tensor:
        """0 to T - 1 in each row."""
        return torch.arange(self.length, device=self.device).expand(self.batch, self.length)

    def attention(self, layer: int) -> Attend:
        """Causal attention, the same in all layers."""
        return causal_attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each row; shapes as in `Attend`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents end to end in one row of N tokens; each sees itself and the documents that it continues.

    lengths: tokens of each document. leads: for each, the index of the earlier document that it continues, or -1.
    Its positions continue those of its lead.
    """

    lengths: tuple[int, ...]
    leads: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, lengths: Sequence[int], leads: Sequence[int] | None = None) -> Documents:
        """Documents of these lengths on the CPU, without leads unless given."""
        leads = (-1,) * len(lengths) if leads is None else tuple(leads)
        assert len(leads) == len(lengths) and all(-1 <= lead < d for d, lead in enumerate(leads)), "leads come first"
        return cls(tuple(lengths), leads, torch.device("cpu"))

    def to(self, device: torch.device | str) -> Documents:
        """The same on another device."""
        return Documents(self.lengths, self.leads, torch.device(device))

    def padded(self, n_tokens: int) -> Documents:
        """With one more document of `n_tokens` at the end, which continues none."""
        return Documents((*self.lengths, n_tokens), (*self.leads, -1), self.device) if n_tokens else self

    @property
    def n_tokens(self) -> int:
        """N."""
        return self.bounds[-1]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each document begins, and N."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def before(self) -> tuple[int, ...]:
        """Tokens that each document continues: its lead's and those that the lead continues."""
        before: list[int] = []
        for lead in self.leads:
            before.append(0 if lead < 0 else before[lead] + self.lengths[lead])
        return tuple(before)

    @cached_property
    def positions(self) -> Tensor:
        """Restarting at each document, after what it continues; [1, N]."""
        shift = np.asarray(self.before, dtype=np.int64) - np.asarray(self.bounds[:-1], dtype=np.int64)
        return torch.from_numpy(np.arange(self.n_tokens) + np.repeat(shift, self.lengths))[None].to(self.device)

    @cached_property
    def document(self) -> Tensor:
        """The number of each token's document, [N]."""
        return torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths)).to(self.device)

    def sums(self, values: Tensor) -> Tensor:
        """values [1, N] summed over the tokens of each document, [n]."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.document, values[0])

    @property
    def counted(self) -> Tensor:
        """1 for each document whose sums this process adds to a loss, [n]: all of them."""
        return torch.ones(len(self.lengths), device=self.device)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The documents that have tokens, each with the keys that it sees."""
        return pieces_of(self.bounds, self.leads)

    def attention(self, layer: int) -> Attend:
        """The same in all layers."""
        return self._attend

    @cached_property
    def _attend(self) -> Attend:
        if self.device.type != "cpu":
            return PieceByPiece(self.pieces, self.device)
        attend = PackedOnCpu(*(torch.tensor(x, dtype=torch.int32) for x in (self.bounds, self.leads)))
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:  # the next row has more or fewer documents
            for x in (attend.bounds, attend.leads):
                dynamo.maybe_mark_dynamic(x, 0)
        return attend
