"""Context parallelism: the tokens of a row split over the cp processes, as Llama 3 does it.

The sequence is cut into 2 x cp chunks and process i holds chunks i and 2 cp - 1 - i, so that all have the same number
of visible pairs under a causal mask. Keys and values are gathered before attention, which grouped heads make small,
and which lets any document mask stand (arXiv 2407.21783, section 3.3.2). Everything else in the model works on one
token at a time and needs nothing.
Price for each layer: a gather of T x 2 K h values forward, a reduce-scatter of as many backward.

Shapes: T tokens of the whole row, n = T / cp of this process, c = n / 2 in a chunk, H heads, K KV heads, h head width.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from arriero.data.loader import IGNORED, Batch

# Their names since torch 2.13, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def held_tokens(length: int, rank: int, size: int) -> Tensor:
    """Indices [length / size] of the tokens that process `rank` of `size` holds, in its order."""
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def without_prefix(batch: Batch) -> Batch:
    """The same documents, each with its own copy of the shared prefix before it; the prefix alone is dropped."""
    p = batch.prefix
    if not p:
        return batch
    bounds = batch.cu_seqlens.tolist()
    # Documents that hold nothing but the prefix have nothing to learn from; they are kept so that none is special.
    tokens = [t for a, b in pairwise(bounds[1:]) for t in (batch.tokens[:, :p], batch.tokens[:, a:b])]
    targets = [t for a, b in pairwise(bounds[1:]) for t in (batch.targets[:, :p], batch.targets[:, a:b])]
    lengths = torch.tensor([0, *(b - a + p for a, b in pairwise(bounds[1:]))])
    return dataclasses.replace(
        batch,
        tokens=torch.cat(tokens, 1),
        targets=torch.cat(targets, 1),
        cu_seqlens=lengths.cumsum(0).to(batch.cu_seqlens),
        prefix=0,
    )


def padded(batch: Batch, length: int) -> Batch:
    """With an untrained document at the end that fills up to `length` tokens."""
    missing = length - batch.tokens.shape[1]
    assert missing >= 0
    if not missing:
        return batch
    return dataclasses.replace(
        batch,
        tokens=F.pad(batch.tokens, (0, missing)),
        targets=F.pad(batch.targets, (0, missing), value=IGNORED),
        cu_seqlens=torch.cat((batch.cu_seqlens, batch.cu_seqlens[-1:] + missing)),
    )


class ContextAttention:
    """Stands for `document_attention` where this process holds a part of the tokens; one object for all layers."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._known: tuple[Tensor, list[tuple[slice, slice]]] | None = None

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, prefix: int = 0) -> Tensor:
        """q: [1, n, H, h]; k, v: [1, n, K, h]. cu_seqlens: document bounds over the T tokens. Returns [1, n, H, h]."""
        assert prefix == 0 and cu_seqlens is not None, "the engine lays the prefix before each document"
        keys, values = self.gather(torch.stack((k[0], v[0]), 1)).unbind(1)
        spans = self.spans(cu_seqlens, q.shape[1])
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            return _packed(q[0], keys, values, spans)[None]
        return torch.cat([_document(q[0, own], keys[seen], values[seen]) for own, seen in spans])[None]

    def gather(self, part: Tensor) -> Tensor:
        """What all processes hold, [n, ...] each, in the order of the row: [T, ...]."""
        whole = _Gather.apply(part, self.group)
        chunks = whole.view(self.size, 2, -1, *part.shape[1:])
        return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1)

    def spans(self, cu_seqlens: Tensor, held: int) -> list[tuple[slice, slice]]:
        """For each piece of a document here, in order: which of our n queries, and the keys up to the last of them."""
        if self._known is None or self._known[0] is not cu_seqlens:  # read from the device once a micro-batch
            bounds, size, spans = cu_seqlens.tolist(), held // 2, []
            for offset, chunk in ((0, self.rank), (size, 2 * self.size - 1 - self.rank)):
                first, last = chunk * size, (chunk + 1) * size
                for start, end in pairwise(bounds):
                    a, b = max(start, first), min(end, last)
                    if a < b:
                        spans.append((slice(a - first + offset, b - first + offset), slice(start, b)))
            self._known = cu_seqlens, spans
        return self._known[1]


def _document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last queries [t, H, h] of a document over its keys and values [s, K, h]."""
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _packed(q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[slice, slice]]) -> Tensor:
    """All pieces in one kernel, whose causal mask is aligned at the ends. Not measured on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = [[s.stop - s.start for s in column] for column in zip(*spans, strict=True)]
    bounds = (torch.tensor([0, *column], device=q.device).cumsum(0).int() for column in lengths)
    seen = torch.cat([torch.arange(s.start, s.stop) for _, s in spans]).to(q.device)
    longest = (max(column) for column in lengths)
    return varlen_attn(q, k[seen], v[seen], *bounds, *longest, window_size=(-1, 0), enable_gqa=True)  # type: ignore


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
