"""Products of bf16 by fp32, against torch's own, and against the exact ones."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from arriero.quant import products
from arriero.quant.products import computed_in, linear, product, widened


@pytest.fixture(params=(True, False), ids=("with instructions", "without"))
def instructions(request, monkeypatch):
    monkeypatch.setattr(products, "_multiplies", lambda dtype: request.param)
    return request.param


def operands(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 19, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(11, 19, generator=g).to(dtype).requires_grad_()
    return x, weight, torch.randn(3, 7, 11, generator=g).to(dtype)


def test_output_and_gradients_are_the_exact_ones_rounded_once(instructions):
    x, weight, gradient = operands()
    y = linear(x, weight)
    ours = (y, *torch.autograd.grad(y, (x, weight), gradient))
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact_y = F.linear(exact_x, exact_weight)
    exact = (exact_y, *torch.autograd.grad(exact_y, (exact_x, exact_weight), gradient.double()))
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-4)


def test_both_ways_agree(monkeypatch):
    x, weight, gradient = operands()
    found = []
    for has in (True, False):
        monkeypatch.setattr(products, "_multiplies", lambda dtype, has=has: has)
        y = linear(x, weight)
        found.append((y, *torch.autograd.grad(y, (x, weight), gradient), product(x[0], weight.T)))
    torch.testing.assert_close(*found, rtol=2**-7, atol=1e-3)


def test_a_frozen_weight_gets_no_gradient_and_no_copy_is_kept(monkeypatch):
    monkeypatch.setattr(products, "_multiplies", lambda dtype: False)
    x, weight, gradient = operands()
    y = linear(x, weight.detach())
    assert {saved.dtype for saved in y.grad_fn.saved_tensors} == {torch.bfloat16}
    assert torch.autograd.grad(y, x, gradient)[0].dtype == torch.bfloat16


def test_only_narrow_types_on_a_cpu_without_instructions_are_widened(instructions):
    narrow = torch.bfloat16 if instructions else torch.float32
    assert computed_in(torch.bfloat16, "cpu") == narrow and widened(operands()[0]).dtype == narrow
    assert computed_in(torch.bfloat16, "cuda") == torch.bfloat16
    for dtype in (torch.float32, torch.float64):
        x, weight, _ = operands(dtype)
        assert computed_in(dtype, "cpu") == dtype
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_model_trains_alike_both_ways(monkeypatch):
    from arriero.losses.lm import chunked_cross_entropy, token_logprobs
    from arriero.model.config import LlamaConfig
    from arriero.model.llama import Llama

    config = LlamaConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1, ffn_dim=40, vocab_size=101, max_context=64)
    tokens = torch.arange(3, 50).view(1, -1)
    found = []
    for has in (True, False):
        monkeypatch.setattr(products, "_multiplies", lambda dtype, has=has: has)
        model = Llama(config).init_weights(std=0.1, seed=1).set_compute_dtype(torch.bfloat16)
        hidden = model.model(tokens).flatten(0, 1)
        loss = chunked_cross_entropy(hidden, model.head.weight, tokens[0].roll(-1))
        loss.backward()
        chosen = token_logprobs(hidden, model.head.weight, tokens[0].roll(-1)).chosen
        found.append((loss.detach() / 47, chosen.detach(), *(p.grad for p in model.parameters())))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_compiled_code_asks_nothing_that_dynamo_warns_of():
    x, w = (torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        torch.compile(lambda x, w: products.linear(x, w).relu(), backend="eager")(x, w).sum().backward()
    assert x.grad is not None
