"""Log-probabilities of tokens over a large vocabulary without a [tokens x vocabulary] tensor.

Logits are computed for a chunk of positions, reduced, and freed. Positions with target -100 are dropped before the
first product and cost nothing. There are two functions, by where the gradient of a position comes from:

- `chunked_cross_entropy`: each position's weight is known beforehand, so the gradient is computed in the forward pass
  from the same logits, and the head runs forward once (with checkpointing it would run twice);
- `token_logprobs`: the gradient arrives in the backward pass (ratios, preferences, distillation), where the logits of a
  chunk are recomputed. With a frozen head they are not: the forward pass computes the gradient of hidden states for an
  incoming gradient of 1, and the backward pass scales its rows.

Price, besides the head's products: one [chunk, V] buffer and one of the head's size.
Idea: Cut Your Losses (arXiv 2411.09009) and Liger's fused loss (2410.10989).

Where the head is sharded by vocabulary (a DTensor), each process computes the logits of its shard, and only a few
numbers per position are exchanged: the largest logit, the sum of exponentials, the target's logit, the entropy's sum.

Twins: `F.cross_entropy` and `log_softmax` on whole logits. Shapes: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from arriero.quant.products import widened

IGNORED = -100
CHUNK = 256  # positions a chunk: 256 x 128,256 fp32 logits are 125 MiB, and the matmul is already at full speed
FUSED_LOGITS = 2**25  # at most in a compiled chunk of up to 1,024 positions: fewer sums of the head's gradient


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    z_loss: float = 0.0,
    compile: bool = False,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Sum over trained positions of -w log softmax(hidden weight^T)[target], a fp32 scalar.

    hidden: final states [N, D]. weight: the head [V, D]; where it is split by vocabulary, hidden's gradient is of this
    process's part only and has to be summed. targets: ids [N], -100 where nothing is trained.
    token_weights: w, fp32 [N], through which no gradient flows; None: 1 everywhere.
    z_loss: adds z w log^2 sum_v exp(logit_v) at each position, which keeps logits from drifting (PaLM, arXiv
    2204.02311, section 5; OLMo 2, 2501.00656).
    compile: make one pass over each chunk's logits and one over their gradient, in compiled code. chunk: positions.
    Divide by the trained tokens of the whole global batch: the sum makes accumulation exact.
    """
    head = _Head.of(weight, compile)
    kept = (targets != IGNORED).nonzero().squeeze(1)
    if chunk is None:
        chunk = CHUNK
        if isinstance(head.passes, _CompiledPasses):
            chunk = min(4 * CHUNK, max(CHUNK, FUSED_LOGITS // len(head.weight)))
    weights = None if token_weights is None else token_weights.index_select(0, kept).to(_wide(hidden))[:, None]
    hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    return _ChunkedCrossEntropy.apply(hidden, head.weight, targets, weights, chunk, z_loss, head.passes)


class Logprobs(NamedTuple):
    """Of each position, fp32 [N], 0 where the target is -100."""

    chosen: Tensor  # log softmax(logits)[target]
    entropy: Tensor  # -sum_v p_v log p_v in nats; zeros unless asked for


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool | Literal["measured"] = False,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Logprobs:
    """log softmax(hidden weight^T / temperature)[target] of each position, and the entropy there; differentiable.

    Arguments as in `chunked_cross_entropy`, which is their negative sum. entropy: "measured" is without its gradient,
    for less work. temperature: what the tokens were sampled at.
    """
    head = _Head.of(weight)
    kept = (targets != IGNORED).nonzero().squeeze(1)
    parts = _TokenLogprobs.apply(
        hidden.index_select(0, kept),
        head.weight,
        targets.index_select(0, kept),
        entropy,
        chunk,
        temperature,
        head.passes,
    )
    zeros = torch.zeros(targets.shape, dtype=_wide(hidden), device=hidden.device)
    return Logprobs(*(zeros.index_put((kept,), part) for part in parts))


class _Head(NamedTuple):
    """This process's rows of the head, and the passes over their logits."""

    weight: Tensor
    passes: _Passes

    @classmethod
    def of(cls, weight: Tensor, compile: bool = False) -> _Head:
        vocabulary = Vocabulary.of(weight)
        fused = compile and vocabulary.group is None
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        return cls(own, _CompiledPasses() if fused else _Passes(vocabulary))


class Vocabulary:
    """The part of the vocabulary that this process's rows of the head are for: all of it, or one of equal parts."""

    def __init__(self, first: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self.first, self.group = first, group

    @classmethod
    def of(cls, weight: Tensor) -> Vocabulary:
        """That of a head [V, D], plain or a DTensor split over one dimension of processes."""
        if not isinstance(weight, DTensor):
            return cls()
        assert weight.placements == (Shard(0),), "a split head is split by vocabulary"
        group = weight.device_mesh.get_group()
        return cls(group.rank() * (weight.shape[0] // group.size()), group)

    def look_up(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log sum exp and the target's logit over the WHOLE vocabulary, from this part's logits [n, V'].

        Each [n, 1]; then the targets as columns of `logits`, and whether they are there (else the column is 0).
        """
        picked = targets[:, None] - self.first
        if self.group is None:
            return logits.logsumexp(1, keepdim=True), logits.gather(1, picked), picked, torch.ones_like(picked)
        here = (picked >= 0) & (picked < logits.shape[1])
        picked = picked.where(here, 0)
        largest = logits.amax(1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        sums = torch.cat(((logits - largest).exp().sum(1, keepdim=True), logits.gather(1, picked) * here), 1)
        dist.all_reduce(sums, group=self.group)
        return largest + sums[:, :1].log(), sums[:, 1:], picked, here.long()

    def sum(self, values: Tensor) -> Tensor:
        """values [n, V'] summed over the WHOLE vocabulary, [n, 1]."""
        total = values.sum(1, keepdim=True)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total


class _Passes:
    """The passes over a chunk's logits and the head's gradient that are not matrix products."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def grade(self, logits: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None) -> Tensor:
        """The loss of a chunk summed over its positions; its gradient takes the logits' place. weights: [n, 1]."""
        wide = logits.to(_wide(logits))
        logsumexp, chosen, picked, here = self.vocabulary.look_up(wide, targets)
        loss = logsumexp - chosen + z_loss * logsumexp.square()
        grad = wide.sub_(logsumexp).exp_()  # softmax
        if z_loss:
            grad *= 1 + 2 * z_loss * logsumexp
        grad.scatter_add_(1, picked, -here.to(grad.dtype))
        if weights is not None:
            loss, grad = loss * weights, grad.mul_(weights)
        if grad is not logits:
            logits.copy_(grad)
        return loss.sum()

    def add(self, total: Tensor, part: Tensor) -> None:
        """total += part, in total's type."""
        total += part


class _CompiledPasses(_Passes):
    """The same over a whole vocabulary: two passes over the logits and one over the gradient, without fp32 copies."""

    def __init__(self) -> None:
        super().__init__(Vocabulary())

    def grade(self, logits: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None) -> Tensor:
        for x in (logits, targets, *(() if weights is None else (weights,))):
            torch._dynamo.maybe_mark_dynamic(x, 0)  # the last chunk is shorter
        return _compiled(_grade_whole)(logits, targets, z_loss, weights)

    def add(self, total: Tensor, part: Tensor) -> None:
        _compiled(_add)(total, part)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _grade_whole(logits: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None) -> Tensor:
    wide, picked = logits.to(_wide(logits)), targets[:, None]
    logsumexp = wide.logsumexp(1, keepdim=True)
    loss = logsumexp - wide.gather(1, picked) + z_loss * logsumexp.square()
    hot = torch.arange(logits.shape[1], device=logits.device) == picked
    grad = (wide - logsumexp).exp() * (1 + 2 * z_loss * logsumexp) - hot.to(wide.dtype)
    if weights is not None:
        loss, grad = loss * weights, grad * weights
    logits.copy_(grad)
    return loss.sum()


def _add(total: Tensor, part: Tensor) -> None:
    total.add_(part)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        chunk: int,
        z_loss: float,
        passes: _Passes,
    ) -> Tensor:
        learns, computed, hidden = hidden.requires_grad, widened(weight.to(hidden.dtype)), widened(hidden)
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if weight.requires_grad else None
        # Both large results of the products have one place for all chunks: fresh memory is faulted in page by page.
        logits = hidden.new_empty(min(chunk, len(targets)), len(weight))
        part = torch.empty_like(computed) if weight.requires_grad else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            here = torch.mm(hidden[rows], computed.T, out=logits[: len(targets[rows])])
            total += passes.grade(here, targets[rows], z_loss, None if weights is None else weights[rows])
            if grad_hidden is not None:
                torch.mm(here, computed, out=grad_hidden[rows])
            if grad_weight is not None:
                passes.add(grad_weight, torch.mm(here.T, hidden[rows], out=part))
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


class _TokenLogprobs(torch.autograd.Function):
    """(log p of the target, entropy), fp32 [n] each, of `hidden` [n, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        entropy: bool | str,
        chunk: int,
        temperature: float,
        passes: _Passes,
    ) -> tuple[Tensor, Tensor]:
        frozen = hidden.requires_grad and not weight.requires_grad
        narrow, computed, vocabulary = hidden, widened(weight.to(hidden.dtype)), passes.vocabulary
        hidden = widened(hidden)
        out = hidden.new_zeros(2, len(targets), dtype=_wide(hidden))
        logsumexps = torch.empty_like(out[0])
        pulled = entropy is True  # whether the entropy has a gradient
        slopes = [torch.empty_like(hidden) for _ in range(1 + pulled)] if frozen else []  # for gradients of 1
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], computed).to(out.dtype).div_(temperature)
            logsumexp, chosen, picked, here = vocabulary.look_up(logits, targets[rows])
            logsumexps[rows], out[0, rows] = logsumexp[:, 0], (chosen - logsumexp)[:, 0]
            if not (entropy or frozen):
                continue
            logp = logits.sub_(logsumexp)
            if entropy:
                out[1, rows] = -vocabulary.sum(logp.exp() * logp)[:, 0]
            for of, slope in enumerate(slopes):
                ones = [torch.ones_like(logsumexp) if of == i else None for i in range(2)]
                grad = _slope(logp, picked, here, out[1, rows, None], *ones)
                torch.mm(grad.div_(temperature).to(hidden.dtype), computed, out=slope[rows])
        ctx.save_for_backward(narrow, weight, targets, logsumexps, out[1], *slopes)
        ctx.chunk, ctx.vocabulary, ctx.entropy, ctx.temperature = chunk, vocabulary, pulled, temperature
        return out[0].clone(), out[1].clone()

    @staticmethod
    def backward(ctx: Any, grad_chosen: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logsumexps, entropies, *slopes = ctx.saved_tensors
        grads = [grad_chosen[:, None], grad_entropy[:, None] if ctx.entropy else None]
        if slopes:
            parts = [
                slope * grad.to(slope.dtype) for slope, grad in zip(slopes, grads, strict=False) if grad is not None
            ]
            return (functools.reduce(torch.add, parts), None, None, None, None, None, None)
        computed, hidden = widened(weight.to(hidden.dtype)), widened(hidden)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = F.linear(hidden[rows], computed).to(logsumexps.dtype).div_(ctx.temperature)
            logp = logits.sub_(logsumexps[rows, None])
            picked = targets[rows, None] - ctx.vocabulary.first
            here = (picked >= 0) & (picked < len(weight))
            of = [None if grad is None else grad[rows] for grad in grads]
            grad = _slope(logp, picked.where(here, 0), here, entropies[rows, None], *of).div_(ctx.temperature)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, computed, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return (grad_hidden, of_weight, None, None, None, None, None)


def _wide(x: Tensor) -> torch.dtype:
    """The type of sums and statistics: fp32, or x's where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _slope(
    logp: Tensor, picked: Tensor, here: Tensor, entropy: Tensor, of_chosen: Tensor | None, of_entropy: Tensor | None
) -> Tensor:
    """The gradient of logits [n, V'] from those of the target's log p and of the entropy, [n, 1] each.

    With p = exp(logp): d log p_t / d logit_v = [v = t] - p_v, and dH / d logit_v = -p_v (log p_v + H).
    """
    p = logp.exp()
    grad = torch.zeros_like(p) if of_entropy is None else -p * (logp + entropy) * of_entropy
    if of_chosen is not None:
        grad -= p * of_chosen
        grad.scatter_add_(1, picked, here * of_chosen)
    return grad
