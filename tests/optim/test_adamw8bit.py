import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from arriero.optim.adamw8bit import BLOCK, CHUNK, AdamW8bit, _nearest, _shares, pack, unpacked
from arriero.optim.build import build_optimizer

CPU = torch.device("cpu")
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def packed(values, signed):
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    scale = torch.zeros(values.shape[0], math.ceil(values.shape[1] / BLOCK))
    pack(values, codes, scale, signed=signed)
    return codes, scale


def matrices(seed=3, shapes=((13, 521), (7, 11), (3, 256))):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * torch.rand(len(p), 1, generator=generator)


@pytest.mark.parametrize("signed", [True, False])
def test_the_shares_are_those_of_dynamic_quantisation(signed):
    """Worked by hand from arXiv 2110.02861, section 1.3: seven powers of ten, each with twice the last one's."""
    shares = _shares(signed, CPU)
    assert len(shares) == 256 and (shares.diff() > 0).all()
    assert shares[-1] == 1 and (shares == 0).sum() == 1
    positive = shares[shares > 0][:-1]
    in_each = [((positive > 10.0 ** (k - 1)) & (positive < 10.0**k)).sum().item() for k in range(-6, 1)]
    assert in_each == [(1 if signed else 2) * 2**i for i in range(7)]
    if signed:
        assert torch.equal(-shares[shares < 0].flip(0), positive)
        assert positive[0] == pytest.approx(0.55e-6)  # the middle of 0.1 and 1, times 1e-6


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_is_stored_as_the_nearest_share(signed):
    shares, generator = _shares(signed, CPU), torch.Generator().manual_seed(7)
    values = torch.rand(5, 521, generator=generator) * 10 ** (-5 * torch.rand(5, 521, generator=generator))
    values *= torch.randn(5, 1, generator=generator).exp()
    if signed:
        values *= torch.randn(5, 521, generator=generator).sign()
    codes, scale = packed(values, signed)
    assert scale.shape == (5, 3)
    for block in range(3):
        part = slice(256 * block, 256 * (block + 1))
        assert torch.equal(scale[:, block], values[:, part].abs().amax(1))
        share = values[:, part] / scale[:, block, None]
        found = unpacked(codes, scale, signed=signed)[:, part] / scale[:, block, None]
        nearest = (share[..., None] - shares).abs().amin(-1)
        # the look-up goes by half precision: off by at most its rounding, 2^-11 of the value
        assert ((share - found).abs() <= nearest + share.abs() * 2**-10 + 1e-7).all()


@pytest.mark.parametrize("signed", [True, False])
def test_stored_values_are_stored_again_as_they_are(signed):
    values = torch.randn(11, 521, generator=torch.Generator().manual_seed(2))
    codes, scale = packed(values if signed else values.abs(), signed)
    again = packed(unpacked(codes, scale, signed=signed), signed)
    assert torch.equal(again[0], codes)
    # the table has 1 but not -1: the largest magnitude, where negative, is stored as -0.993
    torch.testing.assert_close(again[1], scale, atol=0, rtol=0.0071 if signed else 0)


def test_a_second_moment_is_never_rounded_down_to_zero():
    codes, scale = packed(torch.tensor([[1.0, 1e-9, 0.0, 1e-30]]), signed=False)
    smallest = _shares(False, CPU)[1].item()
    assert unpacked(codes, scale, signed=False)[0].tolist() == pytest.approx([1.0, smallest, smallest, smallest])
    assert unpacked(*packed(torch.zeros(1, 3), signed=False), signed=False).count_nonzero() == 0


def test_the_first_step_is_adamws():
    """Nothing has been rounded yet: what is applied is the moments before they are packed."""
    ours, theirs = matrices(), matrices()
    one, two = AdamW8bit(ours, **SETTINGS), AdamW(theirs, **SETTINGS)
    for parameters, optimizer in ((ours, one), (theirs, two)):
        give_gradients(parameters, seed=5)
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_many_steps_stay_near_adamws():
    ours, theirs = matrices(), matrices()
    one, two = AdamW8bit(ours, **SETTINGS), AdamW(theirs, **SETTINGS)
    before = [p.detach().clone() for p in ours]
    for step in range(50):
        for parameters, optimizer in ((ours, one), (theirs, two)):
            give_gradients(parameters, seed=step)
            optimizer.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() < 0.03 * (b - start).norm()


def test_rows_are_stepped_in_chunks_as_they_would_be_at_once(monkeypatch):
    whole, parts = matrices(), matrices()
    for parameters, size in ((whole, 1 << 18), (parts, 1043)):
        monkeypatch.setitem(CHUNK, "cpu", size)
        optimizer = AdamW8bit(parameters, **SETTINGS)
        for step in range(3):
            give_gradients(parameters, seed=step)
            optimizer.step()
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def test_a_row_does_not_disturb_another():
    quiet, loud = matrices(shapes=[(2, 300)]), matrices(shapes=[(2, 300)])
    for parameters, factor in ((quiet, 1.0), (loud, 1e6)):
        optimizer = AdamW8bit(parameters, **SETTINGS)
        for step in range(3):
            give_gradients(parameters, seed=step)
            parameters[0].grad[1] *= factor
            optimizer.step()
    assert torch.equal(quiet[0][0], loud[0][0])


def test_state_takes_a_quarter_of_adamws_memory():
    parameters = matrices(shapes=[(512, 768), (384, 1024)])
    give_gradients(parameters, seed=1)
    optimizer = AdamW8bit(parameters, **SETTINGS)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for p in parameters for t in optimizer.state[p].values())
    n = sum(p.numel() for p in parameters)
    assert held == 2 * n + 2 * 4 * n // BLOCK + 2 * 4  # codes, scales, and each one's count of steps
    assert held < 0.26 * 8 * n


def test_vectors_are_left_to_adamw():
    named = {"norm": nn.Parameter(torch.ones(11)), "matrix": nn.Parameter(torch.ones(3, 5))}
    for p in named.values():
        p.grad = torch.ones_like(p)
    optimizer = build_optimizer(named, "adamw8bit", **SETTINGS)
    optimizer.step()
    assert optimizer.state[named["norm"]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[named["matrix"]]["exp_avg"].dtype == torch.uint8
    assert named["norm"].unique().item() == pytest.approx(0.99)  # not decayed


def test_all_halves_between_minus_one_and_one_have_a_code():
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    for signed in (True, False):
        codes, shares = _nearest(signed, CPU), _shares(signed, CPU)
        inside = (halves.abs() <= 1) & (halves >= (-1 if signed else 0))
        nearest = (halves[inside, None] - shares).abs().amin(1)
        found = (halves[inside] - shares[codes[inside].int()]).abs()
        floor = 0.0 if signed else shares[1].item()  # zero is stored as the smallest
        assert (found <= nearest.clamp(min=floor) + 1e-9).all()
