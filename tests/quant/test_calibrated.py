"""Calibrated rounding: the error of the outputs is what it says, no step raises it, small cases find the best codes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from arriero.quant import calibrated as module
from arriero.quant.calibrated import calibrated, damped, output_error
from arriero.quant.rounding import nearest


def inputs(n: int, width: int, seed: int = 0) -> Tensor:
    """Inputs that hang together, some far larger than others, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * 0.3 + torch.eye(width)
    return torch.randn(n, width, generator=generator) @ mix * torch.rand(width, generator=generator).mul(2).exp()


def matrix(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_the_error_is_that_of_the_outputs():
    x, weight = inputs(101, 64), matrix(13, 64)
    rounded = nearest(weight, "int4").dense()
    expected = (x @ (rounded - weight).T).norm() / (x @ weight.T).norm()
    assert output_error(weight, rounded, x.T @ x) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("kind", "gain"), [("int4", 0.75), ("int8", 0.75)])
def test_it_errs_far_less_than_the_nearest_codes_do(kind, gain):
    x, weight = inputs(997, 192), matrix(101, 192)
    gram = x.T @ x
    ours = output_error(weight, calibrated(weight, gram, kind).dense(), gram)
    assert ours < gain * output_error(weight, nearest(weight, kind).dense(), gram)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_each_round_of_scales_and_codes_lowers_the_error(kind):
    x, weight = inputs(997, 192), matrix(101, 192)
    gram = damped(x.T @ x)
    errors = [output_error(weight, calibrated(weight, x.T @ x, kind, rounds).dense(), gram) for rounds in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.97 * errors[0]


def test_codes_of_a_row_of_five_are_near_the_best_of_all_that_there_are(monkeypatch):
    """With a group of two inputs and few codes all can be tried; coordinate descent must come close to the best."""
    monkeypatch.setitem(module.GROUP, "int4", 4)
    monkeypatch.setitem(module.LIMITS, "int4", (-2, 1))
    x = inputs(50, 4)
    gram = damped(x.T @ x)
    worse = []
    for seed in range(20):
        weight = matrix(1, 4, seed)
        codes, scales = module._rounded(
            weight, gram, torch.linalg.cholesky(torch.linalg.inv(gram), upper=True), "int4", 3
        )
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=4))).float()
        errors = ((every * scales - weight) @ gram * (every * scales - weight)).sum(1)
        ours = ((codes * scales - weight) @ gram * (codes * scales - weight)).sum()
        worse.append(float(ours / errors.min()))
    assert sorted(worse)[10] < 1.01
    assert max(worse) < 2.0


def test_inputs_that_are_never_used_keep_their_nearest_codes_and_nothing_breaks():
    x, weight = inputs(101, 64), matrix(7, 64)
    x[:, 5] = 0
    weight[3] = 0
    held = calibrated(weight, x.T @ x, "int4").dense()
    assert held.isfinite().all()
    assert torch.equal(held[3], torch.zeros(64))
    assert (held[:, 5] - weight[:, 5]).abs().max() < 0.05
    assert calibrated(weight, torch.zeros(64, 64), "int4").dense().isfinite().all()


def test_rows_are_rounded_alike_in_parts(monkeypatch):
    x, weight = inputs(101, 64), matrix(131, 64)
    whole = calibrated(weight, x.T @ x, "int4").dense()
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    parts = calibrated(weight, x.T @ x, "int4").dense()
    assert (parts != whole).float().mean() < 0.01  # sums of other sizes round otherwise, rarely across a border
