"""Filters against transformers' warpers; draws against arithmetic."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from arriero.errors import ConfigError
from arriero.infer.config import SamplingConfig
from arriero.infer.sample import Sampler, draw, filtered, min_p, repetition_penalty, top_k, top_p


@pytest.fixture(params=[101, 1009])  # below and above the head that top-p looks at first
def logits(request):
    return torch.randn(7, request.param, generator=torch.Generator().manual_seed(3)) * 3


def same_kept(ours, theirs):
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    kept = theirs.isfinite()
    torch.testing.assert_close(ours[kept], theirs[kept])


@pytest.mark.parametrize("k", [1, 5, 97, 5000])
def test_top_k_is_transformers(logits, k):
    same_kept(top_k(logits, k), TopKLogitsWarper(k)(None, logits.clone()))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(logits, p):
    same_kept(top_p(logits, p), TopPLogitsWarper(p)(None, logits.clone()))


def test_top_p_sorts_everything_when_the_head_does_not_reach_p():
    flat = torch.randn(3, 4999, generator=torch.Generator().manual_seed(1)) * 0.01
    same_kept(top_p(flat, 0.8), TopPLogitsWarper(0.8)(None, flat.clone()))


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_min_p_is_transformers(logits, p):
    same_kept(min_p(logits, p), MinPLogitsWarper(p)(None, logits.clone()))


def test_repetition_penalty_is_transformers(logits):
    seen = torch.randint(0, 101, (7, 11), generator=torch.Generator().manual_seed(2))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    torch.testing.assert_close(repetition_penalty(logits, seen.tolist(), 1.3), expected)


def test_filters_compose_in_transformers_order(logits):
    config = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05)
    expected = logits / 0.7
    for warper in (TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        expected = warper(None, expected)
    same_kept(filtered(logits, config), expected)


def test_draw_takes_the_token_at_which_the_sum_exceeds_the_uniform_number():
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-24])
    assert draw(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_drawn_frequencies_are_the_probabilities():
    sampler, logits = Sampler(SamplingConfig(temperature=1, seed=7)), torch.tensor([[0.6, 0.3, 0.1]]).log()
    drawn = torch.cat([sampler(logits, [0], [[]]) for _ in range(3000)])
    shares = torch.bincount(drawn, minlength=3) / 3000
    assert (shares - logits.exp()[0]).abs().max() < 0.03  # 3 standard deviations of a share of 0.6 are 0.027


def test_greedy_is_the_argmax_whatever_the_filters(logits):
    assert torch.equal(Sampler(SamplingConfig(top_k=3))(logits, [0] * 7, [[]] * 7), logits.argmax(-1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; it is a probability, in \(0, 1\]"),
        ({"top_k": -3}, "top_k is -3; it must be at least 0"),
        ({"min_p": 1.0}, r"min_p is 1.0; it is a share, in \[0, 1\)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused_on_construction(setting, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**setting)


def test_logits_of_diverged_weights_give_a_token():
    logits = torch.full((3, 101), float("nan"))
    assert (draw(logits, torch.tensor([0.0, 0.5, 0.99])) < 101).all()
