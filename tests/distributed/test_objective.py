"""Losses with several denominators: any split into micro-batches gives one loss and one gradient."""

import pytest
import torch
from helpers.objectives import mixed, mixed_row
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.data.batch import collate, row_groups
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Totals
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama

SHAPE = LlamaConfig(22, 2, 6, 2, 34, 106, 64, head_dim=10)


def gradients(model: Llama, rows: list, n_micro: int) -> tuple[Totals, dict[str, torch.Tensor]]:
    model.zero_grad()
    groups = row_groups(0, len(rows) // n_micro, range(n_micro))
    batches = [collate([rows[i] for i in group]) for group in groups]
    if model.lm_head.weight.dtype == torch.float32:
        for batch in batches:
            batch.token_extras["weight"] = batch.token_extras["weight"].float()
    totals = Engine.alone(model).forward_backward(batches, mixed())
    return totals, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_accumulating_micro_batches_gives_the_gradient_of_the_whole_for_every_denominator(dtype, bound):
    model = Llama(SHAPE).init_weights(std=0.2, seed=1).to(dtype)

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 10**6), min_size=4, max_size=4, unique=True))
    def check(indices):
        rows = [mixed_row(index, SHAPE.vocab_size) for index in indices]
        whole, expected = gradients(model, rows, 1)
        for n_micro in (2, 4):
            totals, found = gradients(model, rows, n_micro)
            assert totals.loss == pytest.approx(whole.loss, rel=bound)
            assert totals.metrics == pytest.approx(whole.metrics, rel=bound)
            for name, grad in expected.items():
                assert float((found[name] - grad).abs().max() / grad.abs().max()) < bound, name

    check()


def test_a_term_that_nothing_is_counted_for_adds_nothing():
    totals = Totals({"token": 3.0, "pair": 0.0}, {"token": 2.0, "pair": 0.0}, {"token": 2.0, "pair": 5.0})
    assert totals.loss == 3.0


def test_the_loss_is_the_weighted_sum_of_the_means():
    totals = Totals({"a": 6.0, "b": 5.0, "c": 8.0}, {"a": 2.0, "b": 10.0, "c": 4.0}, {"a": 1.0, "b": 0.2})
    assert totals.loss == pytest.approx(3.1) and totals.metrics == {"a": 3.0, "b": 0.5, "c": 2.0}
