"""Cross-entropy over a large vocabulary without ever holding [tokens x vocabulary].

Logits are made for a chunk of positions, reduced, and dropped; their gradient is formed in the same pass,
while they are at hand. Positions with target -100 cost nothing: they are dropped before the first product.
Price: the head's forward once (checkpointing would make it twice), one [chunk, V] buffer and one like the head.
Idea: Cut Your Losses (arXiv 2411.09009) and Liger's fused loss (2410.10989).

Where the head is split over processes by vocabulary (a DTensor), each makes the logits of its part, and only three
numbers a position are exchanged: the largest logit, the sum of exponentials and the target's logit.

Twin: `F.cross_entropy` on whole logits. Shapes: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

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
) -> Tensor:
    """Sum over trained positions of -log softmax(hidden weight^T)[target], a fp32 scalar.

    hidden: final states [N, D]. weight: the head [V, D]; where it is split by vocabulary, hidden's gradient is of this
    process's part only and has to be summed. targets: ids [N], -100 where nothing is trained.
    z_loss: adds z log^2 sum_v exp(logit_v) at each position, which keeps logits from drifting (PaLM, arXiv 2204.02311,
    section 5; OLMo 2, 2501.00656).
    compile: make one pass over each chunk's logits and one over their gradient, in compiled code. chunk: positions.
    Divide by the trained tokens of the whole global batch: the sum makes accumulation exact.
    """
    kept = (targets != IGNORED).nonzero().squeeze(1)
    vocabulary = Vocabulary.of(weight)
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    fused = compile and vocabulary.group is None
    if chunk is None:
        chunk = min(4 * CHUNK, max(CHUNK, FUSED_LOGITS // len(weight))) if fused else CHUNK
    hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    passes = _CompiledPasses() if fused else _Passes(vocabulary)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk, z_loss, passes)


@torch.no_grad()
def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """log softmax(hidden weight^T)[target] for each position, fp32 [N]; 0 where the target is -100."""
    out = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    kept = (targets != IGNORED).nonzero().squeeze(1)
    vocabulary = Vocabulary.of(weight)
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    for rows in kept.split(chunk):
        logits = F.linear(hidden[rows], weight.to(hidden.dtype)).float()
        logsumexp, chosen, _, _ = vocabulary.look_up(logits, targets[rows])
        out[rows] = (chosen - logsumexp).squeeze(1)
    return out


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


class _Passes:
    """The passes over a chunk's logits and the head's gradient that are not matrix products."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def grade(self, logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        """The loss of a chunk summed over its positions; its gradient takes the logits' place."""
        wide = logits.float()
        logsumexp, chosen, picked, here = self.vocabulary.look_up(wide, targets)
        loss = (logsumexp - chosen).sum() + z_loss * logsumexp.square().sum()
        grad = wide.sub_(logsumexp).exp_()  # softmax
        if z_loss:
            grad *= 1 + 2 * z_loss * logsumexp
        grad.scatter_add_(1, picked, -here.to(grad.dtype))
        if grad is not logits:
            logits.copy_(grad)
        return loss

    def add(self, total: Tensor, part: Tensor) -> None:
        """total += part, in total's type."""
        total += part


class _CompiledPasses(_Passes):
    """The same over a whole vocabulary: two passes over the logits and one over the gradient, without fp32 copies."""

    def __init__(self) -> None:
        super().__init__(Vocabulary())

    def grade(self, logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        for x in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(x, 0)  # the last chunk is shorter
        return _compiled(_grade_whole)(logits, targets, z_loss)

    def add(self, total: Tensor, part: Tensor) -> None:
        _compiled(_add)(total, part)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _grade_whole(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    wide, picked = logits.float(), targets[:, None]
    logsumexp = wide.logsumexp(1, keepdim=True)
    loss = (logsumexp - wide.gather(1, picked)).sum() + z_loss * logsumexp.square().sum()
    hot = torch.arange(logits.shape[1], device=logits.device) == picked
    logits.copy_((wide - logsumexp).exp() * (1 + 2 * z_loss * logsumexp) - hot.float())
    return loss


def _add(total: Tensor, part: Tensor) -> None:
    total.add_(part)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        z_loss: float,
        passes: _Passes,
    ) -> Tensor:
        computed = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        # Both large results of the products have one place for all chunks: fresh memory is faulted in page by page.
        logits = hidden.new_empty(min(chunk, len(targets)), len(weight))
        part = torch.empty_like(computed) if weight.requires_grad else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            here = torch.mm(hidden[rows], computed.T, out=logits[: len(targets[rows])])
            total += passes.grade(here, targets[rows], z_loss)
            if grad_hidden is not None:
                torch.mm(here, computed, out=grad_hidden[rows])
            if grad_weight is not None:
                passes.add(grad_weight, torch.mm(here.T, hidden[rows], out=part))
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            None,
            None,
            None,
            None,
        )
