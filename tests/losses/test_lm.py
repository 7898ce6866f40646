import pytest
import torch
import torch.nn.functional as F

from arriero.losses.lm import chunked_cross_entropy, token_logprobs


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(61, 13, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(107, 13, generator=g).requires_grad_()
    targets = torch.randint(107, (61,), generator=g)
    targets[::3] = -100
    return hidden, weight, targets


def whole(hidden, weight, targets):
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def test_chunked_loss_and_gradients_equal_the_whole_ones():
    hidden, weight, targets = inputs()
    expected = whole(hidden, weight, targets)
    expected_grads = torch.autograd.grad(expected * 0.37, (hidden, weight))
    for chunk in (1, 7, 40, 1000):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(torch.autograd.grad(loss * 0.37, (hidden, weight)), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_bf16_activations_get_an_fp32_loss_and_fp32_weight_gradients():
    hidden, weight, targets = inputs(torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, targets, 11)
    assert loss.dtype == torch.float32
    # where products of bf16 are computed in fp32 (quant/products.py), neither head nor logits are rounded to bf16
    torch.testing.assert_close(loss, whole(hidden, weight, targets), rtol=1e-3, atol=0)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)


def test_by_hand_two_equal_logits_cost_log_two():
    loss = chunked_cross_entropy(torch.zeros(3, 5), torch.randn(2, 5), torch.tensor([0, -100, 1]))
    torch.testing.assert_close(loss, 2 * torch.log(torch.tensor(2.0)))


def test_nothing_trained_costs_nothing_and_has_zero_gradient():
    hidden, weight, _ = inputs()
    loss = chunked_cross_entropy(hidden, weight, torch.full((61,), -100))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, hidden)[0].abs().sum() == 0


def test_token_logprobs_are_log_softmax_at_the_target():
    hidden, weight, targets = inputs()
    expected = F.linear(hidden, weight).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    expected[targets == -100] = 0
    torch.testing.assert_close(token_logprobs(hidden, weight, targets, chunk=7).chosen, expected)


def test_the_vocabulary_is_never_held_for_all_tokens():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    hidden = torch.randn(997, 3, requires_grad=True)
    weight = torch.randn(1009, 3)
    with Watch():
        chunked_cross_entropy(hidden, weight, torch.arange(997), 64).backward()
    assert largest <= 64 * 1009


def test_z_loss_adds_the_squared_log_partition_and_its_gradient():
    hidden, weight, targets = inputs()
    logsumexp = F.linear(hidden, weight).logsumexp(1)[targets != -100]
    expected = whole(hidden, weight, targets) + 0.03 * logsumexp.square().sum()
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, 7, z_loss=0.03)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("default")  # dynamo's own
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
def test_the_compiled_passes_equal_the_plain_ones(z_loss):
    hidden, weight, targets = inputs()
    plain = chunked_cross_entropy(hidden, weight, targets, 7, z_loss=z_loss)
    plain_grads = torch.autograd.grad(plain, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, 17, z_loss=z_loss, compile=True)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def log_softmax_and_entropy(hidden, weight, targets):
    logp = F.linear(hidden, weight.to(hidden.dtype)).log_softmax(-1)
    chosen = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return [x.where(targets != -100, 0) for x in (chosen, -(logp.exp() * logp).sum(-1))]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("asked", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)], ids=["chosen", "entropy", "both"])
def test_gradients_of_logprobs_and_entropy_are_those_of_whole_logits(frozen, asked):
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in inputs())
    weight = weight.detach().requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight]
    of = torch.randn(61, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(parts):  # not linear, so that what comes from behind differs at each position
        return sum((a * (of * part).sin()).sum() for a, part in zip(asked, parts, strict=True))

    expected = torch.autograd.grad(loss(log_softmax_and_entropy(hidden, weight, targets)), leaves)
    for chunk in (7, 1000):
        ours = token_logprobs(hidden, weight, targets, entropy=True, chunk=chunk)
        for a, b in zip(torch.autograd.grad(loss(ours), leaves), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_cross_entropy_is_the_negative_sum_of_logprobs_and_so_is_its_gradient():
    hidden, weight, targets = inputs()
    weights = torch.rand(61, generator=torch.Generator().manual_seed(5))
    for given in (None, weights):
        direct = chunked_cross_entropy(hidden, weight, targets, 11, token_weights=given)
        behind = -(token_logprobs(hidden, weight, targets, chunk=11).chosen * (1 if given is None else given)).sum()
        torch.testing.assert_close(direct, behind)
        grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (direct, behind)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("default")  # dynamo itself looks at .grad of non-leaf tensors
def test_compiled_passes_weigh_tokens_alike():
    hidden, weight, targets = inputs()
    weights = torch.rand(61, generator=torch.Generator().manual_seed(5))
    losses = [
        chunked_cross_entropy(hidden, weight, targets, 11, 0.1, compile, token_weights=weights)
        for compile in (False, True)
    ]
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_log_probabilities_at_a_temperature_equal_those_of_whole_logits(frozen: bool) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(17, 11, generator=g, requires_grad=True), torch.randn(13, 11, generator=g)
    targets, pull = torch.randint(13, (17,), generator=g), torch.randn(2, 17, generator=g)
    weight.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight]
    found = token_logprobs(hidden, weight, targets, entropy=True, temperature=0.7, chunk=5)
    logp = (hidden @ weight.T / 0.7).log_softmax(1)
    wanted = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = ((pull[0] * x[0] + pull[1] * x[1]).sum() for x in (found, wanted))
    for a, b in zip(*(torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    measured = token_logprobs(hidden, weight, targets, entropy="measured", temperature=0.7)
    torch.testing.assert_close(measured.entropy, wanted[1])
    for a, b in zip(
        *(torch.autograd.grad(pull[0] @ x, leaves, retain_graph=True) for x in (measured.chosen, wanted[0])),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(measured.entropy.sum(), hidden, allow_unused=True)[0].eq(0).all()
