"""Rounding with the best scale: no worse than any scale that a search over all finds, and exact where it can be."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.quant import nf4
from arriero.quant.packed import LEVELS, Quantized, from_indices
from arriero.quant.rounding import LIMITS, best_scales, nearest, short


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_what_is_held_is_the_formula_over_codes_scales_and_levels(kind):
    held = nearest(matrix(13, 192), kind)
    assert held.shape == (13, 192)
    values = held.indices().numpy().astype(np.float32)
    if kind != "int8":
        values = np.array(LEVELS[kind], np.float32)[values.astype(int)]
    expected = values * np.repeat(held.scales.numpy(), held.group, axis=1)
    np.testing.assert_array_equal(held.dense().numpy(), expected)
    np.testing.assert_array_equal(held.rows(3, 7).dense().numpy(), expected[3:7])
    order = torch.randperm(13)
    np.testing.assert_array_equal(held.take(order).dense().numpy(), expected[order.numpy()])


def test_a_minimum_is_added_to_its_group():
    codes = torch.arange(64).view(2, 32) % 16
    scales, least = torch.tensor([[0.5], [2.0]]), torch.tensor([[-3.0], [1.0]])
    held = from_indices("int4-affine", codes, scales, least)
    torch.testing.assert_close(held.dense(), codes * scales + least, rtol=0, atol=0)


def test_two_codes_lie_in_a_byte_the_first_in_its_low_half():
    held = from_indices("int4", torch.tensor([[1, 2, 15, 0]]), torch.ones(1, 1))
    assert held.codes.tolist() == [[0x21, 0x0F]]
    assert held.dense().tolist() == [[-7.0, -6.0, 7.0, -8.0]]


@pytest.mark.parametrize(("kind", "width"), [("int8", 1536), ("int4", 32)])
def test_no_scale_of_many_fits_a_group_much_better(kind, width):
    groups, (low, high) = matrix(67, width), LIMITS[kind]
    ours = best_scales(groups, kind)

    def error(scales: Tensor) -> Tensor:
        codes = (groups / scales[:, None]).round().clamp(low, high)
        return (groups - codes * scales[:, None]).square().sum(1)

    largest = groups.abs().amax(1)
    tried = [error(sign * largest / x) for x in np.linspace(high * 0.7, high * 1.4, 400) for sign in (1.0, -1.0)]
    best = torch.stack(tried).amin(0)
    assert error(ours).sum() < 1.05 * best.sum()
    if kind == "int4":
        assert error(ours).sum() < 0.8 * error(largest / high).sum()


def test_int4_errs_less_than_the_gguf_packages_q4_0():
    weight = matrix(61, 512)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), q4_0), q4_0)
    ours = (nearest(weight, "int4").dense() - weight).square().sum()
    assert ours < 0.9 * np.square(theirs - weight.numpy()).sum()


def test_weights_that_lie_on_a_grid_are_held_exactly():
    codes = torch.randint(-8, 8, (11, 96), generator=torch.Generator().manual_seed(3)).float()
    codes[:, ::32] = -8
    scales = short(torch.rand(11, 3) + 0.01)
    weight = (codes.view(11, 3, 32) * scales[:, :, None]).view(11, 96)
    assert torch.equal(nearest(weight, "int4").dense(), weight)


def test_important_inputs_are_held_better():
    weight = matrix(50, 64)
    importance = torch.ones(64)
    importance[::8] = 100.0
    plain, weighted = (nearest(weight, "int4", v).dense() - weight for v in (None, importance))
    assert weighted[:, ::8].square().sum() < 0.8 * plain[:, ::8].square().sum()


def test_scales_are_the_same_numbers_in_bf16_and_in_fp16():
    scales = torch.cat([matrix(1, 1000)[0] * factor for factor in (1, 1e-3, 1e-5, 1e-7, 100)])
    held = short(scales)
    assert torch.equal(held, held.to(torch.float16).float())
    normal = held.abs() >= 2.0**-14
    assert torch.equal(held[normal], held[normal].to(torch.bfloat16).float())
    torch.testing.assert_close(held[normal], scales[normal], rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_zeros_stay_zeros_and_rows_do_not_depend_on_each_other(kind):
    weight = matrix(5, 64)
    weight[2] = 0
    held = nearest(weight, kind)
    assert torch.equal(held.dense()[2], torch.zeros(64))
    assert torch.equal(held.dense()[3:], nearest(weight[3:], kind).dense())


def test_nf4_is_qloras():
    weight = matrix(7, 128)
    held = nearest(weight, "nf4")
    assert isinstance(held, Quantized)
    assert torch.equal(held.dense(), nf4.dequantize(*nf4.quantize(weight), weight.shape, torch.float32))
