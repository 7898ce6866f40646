"""Number formats: what they hold is near the weight, as the papers say it, and equal on every way there and back."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.quant import int8, nf4
from arriero.quant.formats import FORMATS


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_the_levels_of_nf4_are_the_papers_quantiles():
    """QLoRA, appendix E: quantiles of N(0, 1) at evenly spaced probabilities, 8 on one side and 9 on the other."""
    offset, normal = 0.9677083, NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(nf4.LEVELS, levels, atol=1e-6)


@pytest.mark.parametrize("shape", [(13, 64), (11, 17), (64, 128), (3, 1), (257, 64)])
def test_nf4_takes_the_nearest_level_of_each_block(shape):
    weight = matrix(*shape)
    codes, scales = nf4.quantize(weight)
    assert (tuple(codes.shape), tuple(scales.shape)) == nf4.shapes(shape)
    held = nf4.dequantize(codes, scales, shape, torch.float32).view(-1).double().numpy()
    values = weight.view(-1).double().numpy()
    for start in range(0, len(values), nf4.BLOCK):
        block = values[start : start + nf4.BLOCK]
        choices = np.abs(block).max() * np.array(nf4.LEVELS)
        nearest = np.abs(block[:, None] - choices).min(1)
        np.testing.assert_allclose(np.abs(block - held[start : start + nf4.BLOCK]), nearest, atol=1e-7)


def test_nf4_is_a_byte_for_two_values_the_first_in_its_high_half():
    weight = torch.tensor([[1.0, -1.0, 0.0, 0.45]])
    codes, scales = nf4.quantize(weight)
    assert codes.tolist() == [0xF0, 0x7C]
    assert scales.tolist() == [1.0]


def test_int8_is_off_by_half_a_step_of_its_row_at_most():
    weight = matrix(13, 17) * torch.arange(1, 14)[:, None]
    codes, scales = int8.quantize(weight)
    torch.testing.assert_close(scales, weight.abs().amax(1) / 127, rtol=0, atol=0)
    held = int8.dequantize(codes, scales, weight.shape, torch.float32)
    assert ((held - weight).abs() <= scales[:, None] / 2 + 1e-8).all()
    assert (codes.abs().amax(1) == 127).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_held_is_held_again_alike(kind, dtype):
    """Quantising what was multiplied out gives the same codes: nothing drifts on the way through files."""
    format = FORMATS[kind]
    once = format.rounded(matrix(19, 128).to(dtype))
    assert once.dtype == dtype
    assert torch.equal(format.quantize(once)[0], format.quantize(format.rounded(once))[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_stay_zeros(kind):
    weight = torch.zeros(5, 192)
    weight[2, 64:128] = 3.0
    assert torch.equal(FORMATS[kind].rounded(weight), weight)


def test_a_large_matrix_is_quantised_in_parts_that_make_no_difference(monkeypatch):
    weight = matrix(37, 64)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "_AT_ONCE", 2 * nf4.BLOCK)
    for ours, theirs in zip(nf4.quantize(weight), whole, strict=True):
        assert torch.equal(ours, theirs)
    for dtype in (torch.float32, torch.bfloat16):
        in_parts = nf4.dequantize(*whole, weight.shape, dtype)
        monkeypatch.undo()
        assert torch.equal(in_parts, nf4.dequantize(*whole, weight.shape, dtype))
        monkeypatch.setattr(nf4, "_AT_ONCE", 2 * nf4.BLOCK)
