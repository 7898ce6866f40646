"""Causal attention that stays inside documents and never stores the scores of a whole row.

A batch is packed: documents lie end to end, `cu_seqlens` marks where they begin. On a CPU one call of attention.cpp
does exactly the work needed for all of them (a masked call over the whole row would also compute what the mask throws
away: ten documents in a row would cost ten times the scores). On CUDA, `varlen_attn` does the same in one kernel. The
CPU's is one custom operator, so that torch.compile sees a single opaque node.

Documents that begin with the same tokens (a system prompt) may share them: with `prefix` = p > 0 the first document is
those p tokens, and every later one continues it, so that the model computes them once a row and not once a document.
The mathematics is unchanged, since a causal model's states at the prefix do not depend on what follows.

Without a C++ compiler the CPU's is torch's fused kernel, one call a document, whose backward is slow on short ones.
One layer of SmolLM2-135M, bf16, two Zen 4 cores, torch -> C++ in ms (bench/attention.py): a document of 155 tokens
forward 1.0 -> 0.55, backward 4.3 -> 1.0; six of them 5.9 -> 2.5 and 29 -> 4.8; 400 + 600 tokens 11 -> 5.2 and 27 -> 11.
Those are with fp32 products; of bf16 pairs (Zen 5, one core, four documents of 1024, 12 heads) forward takes 24 instead
of 43, backward 52 instead of 83, and the error against fp64 is 2.0e-3 instead of 1.6e-3 (gradients 2.5e-3 and 1.9e-3).
AMX (Xeon, two cores) is another 2.2 to 3.4 times faster forward, 2.4 to 4.9 backward, with the same error.

Twin: `naive_attention`, which materialises everything and is used by tests only.
Shapes: B batch, T tokens, N = B*T, S cached tokens, H heads, K KV heads, G = H/K, h head width.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.cpp import load_cpp
from arriero.model.cache import KVCache


def document_positions(tokens: Tensor, cu_seqlens: Tensor | None, prefix: int = 0) -> Tensor:
    """Position of each token of `tokens` [B, T] within its document: restarts at every boundary, after the prefix."""
    batch, length = tokens.shape
    if cu_seqlens is None:
        return torch.arange(length, device=tokens.device).expand(batch, length)
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=batch * length)
    order = torch.arange(batch * length, device=tokens.device)
    return (order - starts + prefix * (order >= prefix)).view(batch, length)


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, prefix: int = 0) -> Tensor:
    """Causal attention softmax(q k^T / sqrt(h)) v within each document; returns [B, T, H, h].

    q: [B, T, H, h]; k, v: [B, T, K, h], each KV head serving H/K query heads (arXiv 2305.13245).
    cu_seqlens: int32 [n_documents + 1] over the B*T tokens, or None for one document a row.
    prefix: length of the first document when all later ones continue it, else 0.
    """
    if cu_seqlens is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, prefix
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


def naive_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, prefix: int = 0) -> Tensor:
    """The slow twin of `document_attention`: whole score matrices, fp32, plain arithmetic."""
    batch, length, n_heads, width = q.shape
    repeats = n_heads // k.shape[2]
    flat_q, flat_k, flat_v = (x.float().flatten(0, 1) for x in (q, k, v))
    flat_k, flat_v = (x.repeat_interleave(repeats, dim=1) for x in (flat_k, flat_v))
    bounds = torch.arange(batch + 1) * length if cu_seqlens is None else cu_seqlens.cpu()
    document = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    order = torch.arange(batch * length)
    seen = ((document[:, None] == document[None]) | (order[None] < prefix)) & (order[:, None] >= order[None])
    scores = torch.einsum("qhd,khd->hqk", flat_q, flat_k) / width**0.5
    scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), flat_v).view(q.shape).to(q.dtype)


def _spans(cu_seqlens: Tensor, prefix: int) -> list[tuple[int, int, int]]:
    """(leading tokens shared from the row's beginning, start, end) of each document that has tokens."""
    bounds = cu_seqlens.tolist()
    return [(prefix if start else 0, start, end) for start, end in pairwise(bounds) if end > start]


def _with_lead(x: Tensor, lead: int, start: int, end: int) -> Tensor:
    """The shared tokens and then the document's own, [lead + end - start, ...]."""
    return torch.cat((x[:lead], x[start:end])) if lead else x[start:end]


def _heads_first(x: Tensor) -> Tensor:
    """View x [T, H, h] as [1, H, T, h]."""
    return x.transpose(0, 1)[None]


def _packed_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: int) -> Tensor:
    """Flash attention over packed documents. Not measured on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    if prefix:  # lay the prefix before each document, and take the documents' own rows out again
        lengths = cu_seqlens.diff() + prefix
        lengths[0] = prefix
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        order = torch.arange(int(bounds[-1]), device=q.device)
        document = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
        within = order - bounds[document]
        source = torch.where(within < prefix, within, within - prefix + cu_seqlens[document])
        own = (document == 0) | (within >= prefix)
        return _packed_cuda(q[source], k[source], v[source], bounds, 0)[own]
    longest = int(cu_seqlens.diff().max())
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), enable_gqa=True)  # type: ignore


def _packed_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: int) -> Tensor:
    """One SDPA call per document: for devices and types without a packed kernel (MPS, fp32 on CUDA)."""
    parts = []
    for lead, start, end in _spans(cu_seqlens, prefix):
        one_q, one_k, one_v = (_heads_first(_with_lead(x, lead, start, end)) for x in (q, k, v))
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1)[lead:])
    return torch.cat(parts)


class _Attention(ctypes.Structure):
    """The C++ `Attention`, field by field."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("n_documents", "n_heads", "n_kv_heads", "width", "prefix", "threads", "bf16")),
        *((n, ctypes.c_void_p) for n in ("cu_seqlens", "q", "k", "v", "out", "logsumexp", "grad")),
        *((n, ctypes.c_void_p) for n in ("grad_q", "grad_k", "grad_v")),
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled. OpenMP, to work on torch's own threads."""
    instead = "attention through torch, two to four times slower"
    return load_cpp(Path(__file__).with_suffix(".cpp"), instead, "-fopenmp")


def _native(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where it reads the type of these tensors."""
    dtype = tensors[0].dtype
    readable = dtype in (torch.bfloat16, torch.float32) and all(x.dtype == dtype for x in tensors)
    return load_library() if readable else None


def _arguments(q: Tensor, k: Tensor, cu_seqlens: Tensor, prefix: int, *tensors: Tensor) -> ctypes.c_void_p:
    """What both C++ functions take: `tensors` in the order of the fields, contiguous and held by the caller."""
    assert cu_seqlens.dtype == torch.int32 and int(cu_seqlens[-1]) == len(q), "the documents are the tokens"
    assert prefix in (0, int(cu_seqlens[1])), "the first document is the prefix"
    sizes = len(cu_seqlens) - 1, q.shape[1], *k.shape[1:], prefix
    pointers = (x.data_ptr() for x in (cu_seqlens, *tensors))
    return ctypes.byref(_Attention(*sizes, torch.get_num_threads(), q.dtype == torch.bfloat16, *pointers))  # type: ignore


@torch.library.custom_op("arriero::packed_attention_cpu", mutates_args=())
def _packed_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Output [N, H, h] and log-sum-exp fp32 [N, H] of causal attention, document by document."""
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:2], dtype=torch.float32)
    if native := _native(q, k, v):
        cu_seqlens, *tensors = (x.contiguous() for x in (cu_seqlens, q, k, v))
        native.arriero_attention_forward(_arguments(q, k, cu_seqlens, prefix, *tensors, out, logsumexp))
        return out, logsumexp
    for lead, start, end in _spans(cu_seqlens, prefix):
        one = [_heads_first(_with_lead(x, lead, start, end)) for x in (q, k, v)]
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*one, 0.0, True)
        out[start:end] = part[0, :, lead:].transpose(0, 1)
        logsumexp[start:end] = lse[0, :, lead:].transpose(0, 1)
    return out, logsumexp


@_packed_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("arriero::packed_attention_cpu_backward", mutates_args=())
def _packed_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if native := _native(q, k, v, out, grad):
        cu_seqlens, *tensors = (x.contiguous() for x in (cu_seqlens, q, k, v, out, logsumexp, grad))
        native.arriero_attention_backward(_arguments(q, k, cu_seqlens, prefix, *tensors, *grads))
        return grads
    shared = [torch.zeros(prefix, *x.shape[1:]) for x in (k, v)]  # what all documents ask of the prefix, fp32
    for lead, start, end in _spans(cu_seqlens, prefix):
        tensors = [_with_lead(x, lead, start, end) for x in (grad, q, k, v, out, logsumexp)]
        parts = _document_backward(lead, *tensors)
        for whole, part in zip(grads, parts, strict=True):
            whole[start:end] = part[lead:]
        for total, part in zip(shared, parts[1:], strict=True):
            total[:lead] += part[:lead]
    for whole, total in zip(grads[1:], shared, strict=True):
        whole[:prefix] += total.to(whole.dtype)
    return grads


def _document_backward(
    lead: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, ...]:
    """One document by torch's fused kernel, [T, ., h]; the shared queries' own gradients belong to the prefix."""
    if lead:
        grad = torch.cat((torch.zeros_like(grad[:lead]), grad[lead:]))
    tensors = [_heads_first(x) for x in (grad, q, k, v, out, logsumexp)]
    tensors[5] = tensors[5].contiguous()
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, True)
    return tuple(part[0].transpose(0, 1) for part in fused)


@_packed_cpu_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.prefix = inputs[4]


def _backward(ctx, grad: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    return *_packed_cpu_backward(grad, *ctx.saved_tensors, ctx.prefix), None, None


_packed_cpu.register_autograd(_backward, setup_context=_save_for_backward)
