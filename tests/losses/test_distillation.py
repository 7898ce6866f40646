import math

import pytest
import torch
import torch.nn.functional as F

from arriero.losses.distillation import chunked_distillation, chunked_divergence, divergence

KINDS = ("forward", "reverse", "symmetric")


def inputs(v: int = 23, n: int = 19, d: int = 11, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    targets[::3] = -100
    return hidden, weight, targets, torch.randn(n, v, generator=g, dtype=dtype).log_softmax(1)


def kept(teacher, k):
    """The k most probable tokens of a distribution, and the rest of its probability."""
    top = teacher.topk(k)
    rest = teacher.exp().scatter(1, top.indices, 0).sum(1, keepdim=True).log()
    return top.indices, torch.cat((top.values, rest), 1)


def whole(logits, teacher, kind):
    p = logits.log_softmax(1)
    forward = F.kl_div(p, teacher, log_target=True, reduction="none").sum(1)
    reverse = F.kl_div(teacher, p, log_target=True, reduction="none").sum(1)
    return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_tokens_kept_it_is_the_divergence_over_the_vocabulary(kind):
    hidden, weight, _, teacher = inputs()
    logits = hidden @ weight.T
    torch.testing.assert_close(divergence(logits, *kept(teacher, 23), kind), whole(logits, teacher, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_with_fewer_it_is_the_divergence_of_the_distributions_whose_other_tokens_are_one(kind):
    hidden, weight, _, teacher = inputs()
    logits, (ids, logq) = hidden @ weight.T, kept(teacher, 5)
    p = logits.softmax(1)
    own = p.gather(1, ids)
    outcomes = torch.cat((own, 1 - own.sum(1, keepdim=True)), 1)
    found = divergence(logits, ids, logq, kind)
    torch.testing.assert_close(found, whole(outcomes.log(), logq, kind))
    assert (found <= whole(logits, teacher, kind) + 1e-12).all()


def test_by_hand_a_teacher_of_three_quarters_against_a_fair_coin():
    """KL = 3/4 ln(3/2) + 1/4 ln(1/2); reversed 1/2 ln(2/3) + 1/2 ln 2."""
    logq = torch.tensor([[math.log(3 / 4), math.log(1 / 4)]])
    logits, ids = torch.zeros(1, 2), torch.tensor([[1]])
    forward, reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert divergence(logits, ids, logq).item() == pytest.approx(forward, rel=1e-6)
    assert divergence(logits, ids, logq, "reverse").item() == pytest.approx(reverse, rel=1e-6)
    assert divergence(logits, ids, logq, "symmetric").item() == pytest.approx((forward + reverse) / 2, rel=1e-6)


def test_a_teacher_that_is_certain_gives_cross_entropy():
    logits = torch.randn(7, 13, dtype=torch.float64)
    ids = torch.arange(7)[:, None]
    certain = torch.tensor([[0.0, -math.inf]], dtype=torch.float64).expand(7, 2)
    torch.testing.assert_close(divergence(logits, ids, certain), F.cross_entropy(logits, ids[:, 0], reduction="none"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", (1, 5, 100))
def test_chunks_give_the_loss_and_the_gradient_of_whole_logits(kind, chunk):
    hidden, weight, targets, teacher = inputs()
    ids, logq = kept(teacher, 5)
    loss, nats, apart = chunked_distillation(hidden, weight, targets, ids, logq, kind, 0.3, chunk)
    logits, at = hidden @ weight.T, targets != -100
    expected_nats = F.cross_entropy(logits[at], targets[at], reduction="sum")
    expected_apart = divergence(logits[at], ids[at], logq[at], kind).sum()
    expected = 0.7 * expected_nats + 0.3 * expected_apart
    torch.testing.assert_close((loss, nats, apart), (expected, expected_nats.detach(), expected_apart.detach()))
    ours = torch.autograd.grad(loss * 0.37, (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(expected * 0.37, (hidden, weight)))


def test_a_frozen_head_gets_no_gradient_and_nothing_trained_costs_nothing():
    hidden, weight, targets, teacher = inputs()
    ids, logq = kept(teacher, 5)
    loss, *_ = chunked_distillation(hidden, weight.detach(), targets, ids, logq)
    assert torch.autograd.grad(loss, hidden)[0].abs().sum() > 0
    loss, nats, apart = chunked_distillation(hidden, weight, torch.full_like(targets, -100), ids, logq)
    assert (loss.item(), nats.item(), apart.item()) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("k", [0, 5, 23])
def test_a_teacher_that_reads_along_gives_the_divergence_and_gradient_of_whole_logits(kind, k):
    generator = torch.Generator().manual_seed(7)
    n, v, widths = 19, 23, (11, 13)
    hidden, theirs = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in widths)
    ours, other = (torch.randn(v, d, generator=generator, dtype=torch.float64) for d in widths)
    targets = torch.arange(n).where(torch.arange(n) % 3 > 0, -100)
    for x in (hidden, ours):
        x.requires_grad_()
    total, each = chunked_divergence(hidden, theirs, ours, other, targets, kind, k, chunk=5)
    logits, teacher = hidden @ ours.T, (theirs @ other.T).log_softmax(1)
    if k == 5:
        ids, logq = kept(teacher, k)
        apart = divergence(logits, ids, logq, kind)
    else:
        apart = whole(logits, teacher, kind)
    wanted = apart.masked_fill(targets < 0, 0)
    torch.testing.assert_close(each, wanted.detach())
    torch.testing.assert_close(total, wanted.sum())
    for mine, reference in zip(
        *(torch.autograd.grad(x, (hidden, ours)) for x in (total * 3, wanted.sum() * 3)), strict=True
    ):
        torch.testing.assert_close(mine, reference)
