"""Knowledge distillation: how far a student's next-token distribution is from a teacher's, and learning from that.

A teacher's distribution over a vocabulary V is kept as its k most probable tokens and the probability of all others
together (data/teacher.py). Compared are these k + 1 outcomes, which the student's distribution is summed to:

    forward    KL(q || p) = sum q log(q / p)      covers all that the teacher would say (arXiv 1503.02531, 1606.07947)
    reverse    KL(p || q)                         keeps to what the teacher finds likely (MiniLLM, 2306.08543)
    symmetric  (forward + reverse) / 2

with q the teacher, p the student. **The error of k**: each is at most the divergence over the whole vocabulary, and
misses from forward exactly q_rest KL(q within the rest || p within the rest), so at most what the rest can differ by
times its probability; with k = V nothing is missing. Twin: KL over the whole vocabulary, at k = V.

Shapes: N positions, D model width, V vocabulary, k tokens kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from arriero.quant.products import widened

Kind = Literal["forward", "reverse", "symmetric"]
CHUNK = 256  # positions whose logits exist at a time


def divergence(logits: Tensor, ids: Tensor, logq: Tensor, kind: Kind = "forward") -> Tensor:
    """The divergence in nats of each position, [n]; see the module.

    logits: the student's [n, V]. ids: the tokens that are kept, int64 [n, k]. logq: the teacher's log-probabilities of
    them and, last, of all others together (-inf where there are none), [n, k + 1].
    """
    whole = logits.logsumexp(1, keepdim=True)
    logp = logits.gather(1, ids) - whole
    if ids.shape[1] < logits.shape[1]:
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True) - whole
        logp = torch.cat((logp, rest), 1)
    else:
        logq = logq[:, :-1]
    logq = logq.clamp(min=-100)  # of a probability that is 0 in the teacher's type
    forward = (logq.exp() * (logq - logp)).sum(1)
    if kind == "forward":
        return forward
    reverse = (logp.exp() * (logp - logq)).sum(1)
    return reverse if kind == "reverse" else (forward + reverse) / 2


def chunked_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ids: Tensor,
    logq: Tensor,
    kind: Kind = "forward",
    share: float = 0.5,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over trained positions: (1 - share) cross-entropy + share divergence, and each of the two (no gradient).

    hidden: final states [N, D]. weight: the whole head [V, D]. targets: ids [N], -100 where nothing is trained.
    ids, logq: as in `divergence`, [N, k] and [N, k + 1]. Logits exist for `chunk` positions at a time; the gradient is
    computed with them, so the head runs forward once.
    """
    assert not isinstance(weight, DTensor), "DistillConfig refuses a head that is split by vocabulary"
    kept = (targets != -100).nonzero().squeeze(1)
    given = (x.index_select(0, kept) for x in (targets, ids, logq))
    total, parts = _Distillation.apply(hidden.index_select(0, kept), weight, *given, kind, share, chunk)
    return total, parts[0], parts[1]


def whole_divergence(logits: Tensor, logq: Tensor, kind: Kind = "forward") -> Tensor:
    """The divergence in nats of each position over the whole vocabulary, [n].

    logits: the student's [n, V]. logq: the teacher's log-probabilities, [n, V].
    """
    logp, logq = logits.log_softmax(1), logq.clamp(min=-100)
    forward = (logq.exp() * (logq - logp)).sum(1)
    if kind == "forward":
        return forward
    reverse = (logp.exp() * (logp - logq)).sum(1)
    return reverse if kind == "reverse" else (forward + reverse) / 2


def chunked_divergence(
    hidden: Tensor,
    theirs: Tensor,
    weight: Tensor,
    their_weight: Tensor,
    targets: Tensor,
    kind: Kind = "forward",
    k: int = 0,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The divergence from a teacher that reads the same tokens: its sum, and each position's [N] (no gradient).

    hidden, theirs: final states of student [N, D] and teacher [N, D']. weight, their_weight: the whole heads, [V, D]
    and [V, D']. targets: ids [N], -100 where nothing is compared. k: the teacher's most probable tokens that are
    compared one by one, the rest as one outcome; 0 compares all V. chunk: positions whose logits exist at a time.
    """
    assert not isinstance(weight, DTensor), "OnPolicyDistillConfig refuses a head that is split by vocabulary"
    kept = (targets != -100).nonzero().squeeze(1)
    ours, others = hidden.index_select(0, kept), theirs.index_select(0, kept)
    total, each = _Divergence.apply(ours, others, weight, their_weight, kind, k, chunk)
    return total, each.new_zeros(targets.shape).index_put((kept,), each)


class _Divergence(torch.autograd.Function):
    """The gradient of hidden states and head in the forward pass, as in `_Distillation`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, theirs: Tensor, weight: Tensor, their_weight: Tensor, kind: Kind, k: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        computed, wide = widened(weight.to(hidden.dtype)), torch.promote_types(hidden.dtype, torch.float32)
        their_head, each = widened(their_weight.to(theirs.dtype)), hidden.new_zeros(len(hidden), dtype=wide)
        hidden, theirs = widened(hidden), widened(theirs)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logq = (theirs[rows] @ their_head.T).to(wide).log_softmax(1)
            logits = (hidden[rows] @ computed.T).to(wide).requires_grad_()
            with torch.enable_grad():
                found = _to_teacher(logits, logq, kind, k)
                summed = found.sum()
            each[rows] = found.detach()
            if grad_hidden is None and grad_weight is None:
                continue
            (grad,) = torch.autograd.grad(summed, logits)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, computed, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return hidden, None, weight, None, None, None, None


def _to_teacher(logits: Tensor, logq: Tensor, kind: Kind, k: int) -> Tensor:
    """The divergence of each position, from the teacher's whole distribution or its k most probable tokens."""
    if not k:
        return whole_divergence(logits, logq, kind)
    top = logq.topk(min(k, logq.shape[1]), dim=1)
    rest = logq.scatter(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
    return divergence(logits, top.indices, torch.cat((top.values, rest), 1), kind)


class _Distillation(torch.autograd.Function):
    """The gradient of hidden states and head in the forward pass, as in `lm.chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, logq: Tensor, kind: Kind,
        share: float, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        computed, wide = widened(weight.to(hidden.dtype)), torch.promote_types(hidden.dtype, torch.float32)
        total, parts = hidden.new_zeros((), dtype=wide), hidden.new_zeros(2, dtype=wide)
        learns, hidden = hidden.requires_grad, widened(hidden)
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ computed.T).to(wide).requires_grad_()
            with torch.enable_grad():
                nats = (logits.logsumexp(1) - logits.gather(1, targets[rows, None])[:, 0]).sum()
                apart = divergence(logits, ids[rows], logq[rows].to(wide), kind).sum()
                loss = (1 - share) * nats + share * apart
            total += loss.detach()
            parts += torch.stack((nats, apart)).detach()
            if grad_hidden is None and grad_weight is None:
                continue
            (grad,) = torch.autograd.grad(loss, logits)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, computed, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None)
