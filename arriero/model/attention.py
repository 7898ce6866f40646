"""Causal attention that stays inside documents and never stores the scores.

A batch is packed: documents lie end to end, `cu_seqlens` marks where they begin. On a CPU one fused call per
document does exactly the work needed (a masked call over the whole row would also compute what the mask
throws away: ten documents in a row would cost ten times the scores). On CUDA, `varlen_attn` does the same in one
kernel. The per-document loop is one custom operator, so that torch.compile sees a single opaque node.

Twin: `naive_attention`, which materialises everything and is used by tests only.
Shapes: B batch, T tokens, N = B*T, S cached tokens, H heads, K KV heads, h head width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.model.cache import KVCache


def document_positions(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Position of each token of `tokens` [B, T] within its document, restarting at every boundary."""
    batch, length = tokens.shape
    if cu_seqlens is None:
        return torch.arange(length, device=tokens.device).expand(batch, length)
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=batch * length)
    return (torch.arange(batch * length, device=tokens.device) - starts).view(batch, length)


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Causal attention softmax(q k^T / sqrt(h)) v within each document; returns [B, T, H, h].

    q: [B, T, H, h]; k, v: [B, T, K, h], each KV head serving H/K query heads (arXiv 2305.13245).
    cu_seqlens: int32 [n_documents + 1] over the B*T tokens, or None for one document a row.
    """
    if cu_seqlens is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens
    if q.device.type == "cpu":
        out, _ = _packed_cpu(*flat)
    elif q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        out = _packed_cuda(*flat)
    else:
        out = _packed_loop(*flat)
    return out.view(q.shape)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
    """Attention of T new tokens over the cache and themselves; writes k and v to the cache. Returns [B, T, H, h].

    Row b's new token t sits at position `cache.lengths[b] + t` and sees positions up to its own.
    """
    positions = cache.positions(q.shape[1])
    keys, values = cache.write(layer, k, v, positions)
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None, :, None]  # [B, 1, T, S]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys.to(q.dtype), values.to(q.dtype), attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The slow twin of `document_attention`: whole score matrices, fp32, plain arithmetic."""
    batch, length, n_heads, width = q.shape
    repeats = n_heads // k.shape[2]
    flat_q, flat_k, flat_v = (x.float().flatten(0, 1) for x in (q, k, v))
    flat_k, flat_v = (x.repeat_interleave(repeats, dim=1) for x in (flat_k, flat_v))
    bounds = torch.arange(batch + 1) * length if cu_seqlens is None else cu_seqlens.cpu()
    document = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    order = torch.arange(batch * length)
    seen = (document[:, None] == document[None]) & (order[:, None] >= order[None])
    scores = torch.einsum("qhd,khd->hqk", flat_q, flat_k) / width**0.5
    scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), flat_v).view(q.shape).to(q.dtype)


def _packed_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Flash attention over packed documents. Not measured on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    longest = int(cu_seqlens.diff().max())
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), enable_gqa=True)  # type: ignore


def _packed_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One SDPA call per document: for devices and types without a packed kernel (MPS, fp32 on CUDA)."""
    parts = []
    for start, end in _spans(cu_seqlens):
        one_q, one_k, one_v = (_document(x, start, end) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, enable_gqa=True))
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return [(start, end) for start, end in pairwise(bounds) if end > start]


def _document(x: Tensor, start: int, end: int) -> Tensor:
    """View tokens start..end of x [N, H, h] as [1, H, T, h]."""
    return x[start:end].transpose(0, 1)[None]


@torch.library.custom_op("arriero::packed_attention_cpu", mutates_args=())
def _packed_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, H, h] and log-sum-exp fp32 [N, H] of causal attention, document by document."""
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:2], dtype=torch.float32)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for start, end in _spans(cu_seqlens):
        part, lse = flash(*(_document(x, start, end) for x in (q, k, v)), 0.0, True)
        out[start:end] = part[0].transpose(0, 1)
        logsumexp[start:end] = lse[0].transpose(0, 1)
    return out, logsumexp


@_packed_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("arriero::packed_attention_cpu_backward", mutates_args=())
def _packed_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for start, end in _spans(cu_seqlens):
        tensors = [_document(x, start, end) for x in (grad, q, k, v, out)]
        lse = logsumexp[start:end].transpose(0, 1)[None].contiguous()
        for whole, part in zip(grads, flash_backward(*tensors, lse, 0.0, True), strict=True):
            whole[start:end] = part[0].transpose(0, 1)
    return grads


@_packed_cpu_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _backward(ctx, grad: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    return *_packed_cpu_backward(grad, *ctx.saved_tensors), None


_packed_cpu.register_autograd(_backward, setup_context=_save_for_backward)
