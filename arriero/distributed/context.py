"""Context parallelism: the tokens of a row split over the cp processes, as Llama 3 does it.

The sequence is cut into 2 x cp chunks and process i holds chunks i and 2 cp - 1 - i, so that all have the same number
of visible pairs under a causal mask. Keys and values are gathered before attention (arXiv 2407.21783, section 3.3.2):
with grouped-query attention they are small, and any packing of documents, shared prompts included, works as it is.
Everything else in the model works on one token at a time and needs no communication.
Price for each layer: a gather of T x 2 K h values forward, a reduce-scatter of as many backward.

Shapes: T tokens of the whole row, n = T / cp of this process, c = n / 2 in a chunk, H heads, K KV heads, h head width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.model.attention import Piece, PieceByPiece
from arriero.model.layout import Attend, Documents

# Their names since torch 2.13, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def held_tokens(length: int, rank: int, size: int) -> Tensor:
    """Indices [length / size] of the tokens that process `rank` of `size` holds, in its order."""
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


class HeldDocuments:
    """A layout: this process's tokens of packed documents, which attend to those of the other processes too."""

    def __init__(self, documents: Documents, group: dist.ProcessGroup) -> None:
        self.documents, self.group, self.rank, self.size = documents, group, group.rank(), group.size()
        self.held = held_tokens(documents.n_tokens, self.rank, self.size).to(documents.device)
        self.positions = documents.positions[:, self.held]

    def attention(self, layer: int) -> Attend:
        """The same function for all layers; it gathers keys and values."""
        return self._attend

    @torch.compiler.disable
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [1, n, H, h]; k, v: [1, n, K, h]. Returns [1, n, H, h]."""
        keys, values = self.gather(torch.stack((k[0], v[0]), 1)).unbind(1)
        return self._pieces(q, keys[None], values[None])

    def gather(self, part: Tensor) -> Tensor:
        """All processes' tensors [n, ...], concatenated in the order of the row: [T, ...]."""
        whole = _Gather.apply(part, self.group)
        chunks = whole.view(self.size, 2, -1, *part.shape[1:])
        return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1)

    def sums(self, values: Tensor) -> Tensor:
        """values [1, n] summed over the tokens of each document on all processes, [documents]."""
        own = values.new_zeros(len(self.documents.lengths))
        return _Sum.apply(own.index_add(0, self.documents.document[self.held], values[0]), self.group)

    @property
    def counted(self) -> Tensor:
        """1 for each document whose sums this process adds to a loss: all on the first process, none on others."""
        return self.documents.counted * float(self.rank == 0)

    @cached_property
    def _pieces(self) -> PieceByPiece:
        """Each part of a document that this process holds, in order, with the keys up to its last query."""
        size, pieces = len(self.held) // 2, []
        for offset, chunk in ((0, self.rank), (size, 2 * self.size - 1 - self.rank)):
            first, last = chunk * size, (chunk + 1) * size
            for own, keys in self.documents.pieces:
                a, b = max(own.start, first), min(own.stop, last)
                if a < b:
                    here = slice(a - first + offset, b - first + offset)
                    pieces.append(Piece(here, (*keys[:-1], slice(own.start, b))))
        return PieceByPiece(pieces, self.documents.device)


class _Gather(torch.autograd.Function):
    """Concatenate the parts of all processes; backward sums each part's gradients over them."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.n = group, len(part)
        whole = part.new_empty(group.size() * len(part), *part.shape[1:])
        all_gather(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty(ctx.n, *grad.shape[1:])
        reduce_scatter(part, grad.contiguous(), group=ctx.group)
        return part, None


class _Sum(torch.autograd.Function):
    """Sum over processes; backward sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, whole = group, part.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole, None
