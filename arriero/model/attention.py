"""Kernels of causal attention over documents packed into one row; none materialises the scores of a whole row.

A layout (layout.py) says which document sees what. On a CPU one call of attention.cpp does exactly the work needed for
all documents (a masked call over the whole row would also compute what the mask throws away: ten documents in a row
would cost ten times the scores); it is one custom operator, so that torch.compile sees a single opaque node. On CUDA
`varlen_attn` does the same in one kernel, and elsewhere torch's fused kernel is called piece by piece.

Without a C++ compiler the CPU's is torch's fused kernel, one call a document, whose backward is slow on short ones.
One layer of SmolLM2-135M, bf16, two Zen 4 cores, torch -> C++ in ms (bench/attention.py): a document of 155 tokens
forward 1.0 -> 0.55, backward 4.3 -> 1.0; six of them 5.9 -> 2.5 and 29 -> 4.8; 400 + 600 tokens 11 -> 5.2 and 27 -> 11.
Those are with fp32 products; of bf16 pairs (Zen 5, one core, four documents of 1024, 12 heads) forward takes 24 instead
of 43, backward 52 instead of 83, and the error against fp64 is 2.0e-3 instead of 1.6e-3 (gradients 2.5e-3 and 1.9e-3).
AMX (Xeon, two cores) is another 2.2 to 3.4 times faster forward, 2.4 to 4.9 backward, with the same error.

Twin: `naive_attention`, which materialises everything and is used by tests only.
Shapes: N tokens of a row, n documents, H heads, K KV heads, h head width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.system.cpp import load_cpp


class Piece(NamedTuple):
    """Consecutive queries of a row, and the ranges of keys that they attend to, their own as the last."""

    queries: slice
    keys: tuple[slice, ...]


def pieces_of(bounds: Sequence[int], leads: Sequence[int]) -> list[Piece]:
    """Each document that has tokens, behind the documents that it continues, the first of those first.

    bounds: [n + 1], where documents begin, and N. leads: [n], the index of the document that each continues, or -1.
    """
    seen: list[tuple[slice, ...]] = []
    for d, lead in enumerate(leads):
        own = slice(bounds[d], bounds[d + 1])
        before = seen[lead] if lead >= 0 else ()
        seen.append((*before, own) if own.stop > own.start else before)
    return [Piece(keys[-1], keys) for d, keys in enumerate(seen) if bounds[d + 1] > bounds[d]]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], leads: Sequence[int]) -> Tensor:
    """The slow twin: whole score matrices, fp32, plain arithmetic. Arguments as in `pieces_of`, shapes [1, N, ., h]."""
    n, repeats, width = q.shape[1], q.shape[2] // k.shape[2], q.shape[3]
    flat_q, flat_k, flat_v = (x.float().flatten(0, 1) for x in (q, k, v))
    flat_k, flat_v = (x.repeat_interleave(repeats, dim=1) for x in (flat_k, flat_v))
    within = torch.eye(len(leads), dtype=torch.bool)  # [document, another that it is or continues]
    for d, lead in enumerate(leads):
        if lead >= 0:
            within[d] |= within[lead]
    document = torch.repeat_interleave(torch.arange(len(leads)), torch.tensor(bounds).diff())
    seen = within[document][:, document] & torch.ones(n, n, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", flat_q, flat_k) / width**0.5
    scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), flat_v).view(q.shape).to(q.dtype)


@dataclass(frozen=True, eq=False)
class PackedOnCpu:
    """Attention of all documents in one call; `bounds` int32 [n + 1] and `leads` int32 [n] as in `pieces_of`."""

    bounds: Tensor
    leads: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [1, N, H, h]; k, v: [1, N, K, h], each KV head serving H/K query heads (arXiv 2305.13245); like q."""
        out, _ = _packed_cpu(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self.bounds, self.leads)
        return out.view(q.shape)


class PieceByPiece:
    """Attention of pieces: one kernel for all on CUDA (not measured on a GPU), else one call of torch's for each."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self.pieces = pieces
        lengths = [[p.queries.stop - p.queries.start for p in pieces], [_length(p.keys) for p in pieces]]
        self.longest = [max(column, default=0) for column in lengths]
        self.bounds = [F.pad(torch.tensor(column).cumsum(0), (1, 0)).to(device, torch.int32) for column in lengths]
        self.seen = torch.cat([torch.arange(s.start, s.stop) for p in pieces for s in p.keys]).to(device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [1, n, H, h], the queries of all pieces in order; k, v: [1, N, K, h]. Returns what is like q."""
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            from torch.nn.attention.varlen import varlen_attn  # its causal mask is aligned at the ends

            keys, values = (x[0].index_select(0, self.seen) for x in (k, v))
            bounds: Any = (*self.bounds, *self.longest)
            out: Any = varlen_attn(q[0], keys, values, *bounds, window_size=(-1, 0), enable_gqa=True)
            return cast(Tensor, out[None])
        return torch.cat([self._one(piece, q[0], k[0], v[0]) for piece in self.pieces])[None]

    @staticmethod
    def _one(piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (_heads_first(x) for x in (q[piece.queries], _behind(k, piece), _behind(v, piece)))
        n, seen = queries.shape[2], keys.shape[2]
        mask = None if n == seen else torch.ones(n, seen, dtype=torch.bool, device=q.device).tril(seen - n)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out[0].transpose(0, 1)


def _length(slices: Sequence[slice]) -> int:
    return sum(s.stop - s.start for s in slices)


def _behind(x: Tensor, piece: Piece) -> Tensor:
    """The rows of x [N, ...] that a piece sees."""
    return x[piece.keys[0]] if len(piece.keys) == 1 else torch.cat([x[s] for s in piece.keys])


def _wide(x: Tensor) -> torch.dtype:
    """The type of sums and statistics: fp32, or x's where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _heads_first(x: Tensor) -> Tensor:
    """View x [T, H, h] as [1, H, T, h]."""
    return x.transpose(0, 1)[None]


class _Attention(ctypes.Structure):
    """The C++ `Attention`, field by field."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("n_documents", "n_heads", "n_kv_heads", "width", "threads", "bf16")),
        *((n, ctypes.c_void_p) for n in ("bounds", "leads", "q", "k", "v", "out", "logsumexp", "grad")),
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


def _arguments(q: Tensor, k: Tensor, bounds: Tensor, leads: Tensor, *tensors: Tensor) -> ctypes.c_void_p:
    """What both C++ functions take: `tensors` in the order of the fields, contiguous and held by the caller."""
    assert bounds.dtype == leads.dtype == torch.int32 and int(bounds[-1]) == len(q), "the documents are the tokens"
    sizes = len(leads), q.shape[1], *k.shape[1:]
    pointers = (x.data_ptr() for x in (bounds, leads, *tensors))
    return ctypes.byref(_Attention(*sizes, torch.get_num_threads(), q.dtype == torch.bfloat16, *pointers))  # type: ignore


@torch.library.custom_op("arriero::packed_attention_cpu", mutates_args=())
def _packed_cpu(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, leads: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, H, h] and log-sum-exp fp32 [N, H] of causal attention, document by document."""
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:2], dtype=_wide(q))
    if native := _native(q, k, v):
        bounds, leads, *tensors = (x.contiguous() for x in (bounds, leads, q, k, v))
        native.arriero_attention_forward(_arguments(q, k, bounds, leads, *tensors, out, logsumexp))
        return out, logsumexp
    for piece in pieces_of(bounds.tolist(), leads.tolist()):
        own, lead = piece.queries, _length(piece.keys[:-1])
        one = [_heads_first(_behind(x, piece)) for x in (q, k, v)]
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*one, 0.0, True)
        out[own] = part[0, :, lead:].transpose(0, 1)
        logsumexp[own] = lse[0, :, lead:].transpose(0, 1)
    return out, logsumexp


@_packed_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, leads: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_wide(q))


@torch.library.custom_op("arriero::packed_attention_cpu_backward", mutates_args=())
def _packed_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, leads: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = q.new_empty(q.shape)
    if native := _native(q, k, v, out, grad):
        grads = grad_q, k.new_empty(k.shape), v.new_empty(v.shape)
        bounds, leads, *tensors = (x.contiguous() for x in (bounds, leads, q, k, v, out, logsumexp, grad))
        native.arriero_attention_backward(_arguments(q, k, bounds, leads, *tensors, *grads))
        return grads
    grad_k, grad_v = (torch.zeros(x.shape, dtype=_wide(x)) for x in (k, v))  # many documents ask of a lead
    for piece in pieces_of(bounds.tolist(), leads.tolist()):
        lead = _length(piece.keys[:-1])
        parts = _document_backward(lead, *(_behind(x, piece) for x in (grad, q, k, v, out, logsumexp)))
        grad_q[piece.queries] = parts[0][lead:]
        for total, part in zip((grad_k, grad_v), parts[1:], strict=True):
            for rows, here in zip(piece.keys, part.split([s.stop - s.start for s in piece.keys]), strict=True):
                total[rows] += here
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _document_backward(
    lead: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, ...]:
    """One document by torch's fused kernel, [T, ., h]; the queries' gradients of its `lead` first tokens are theirs."""
    if lead:
        grad = torch.cat((torch.zeros_like(grad[:lead]), grad[lead:]))
    tensors = [_heads_first(x) for x in (grad, q, k, v, out, logsumexp)]
    tensors[5] = tensors[5].contiguous()
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, True)
    return tuple(part[0].transpose(0, 1) for part in fused)


@_packed_cpu_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, leads: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, grad: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    return *_packed_cpu_backward(grad, *ctx.saved_tensors), None, None


_packed_cpu.register_autograd(_backward, setup_context=_save_for_backward)
