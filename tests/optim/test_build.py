import pytest
import torch
from torch import nn
from torch.optim import Muon

from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.optim.build import build_optimizer
from arriero.optim.muon import WideMuon, orthogonalised

CONFIG = LlamaConfig(dim=44, n_layers=2, n_heads=11, n_kv_heads=11, ffn_dim=29, vocab_size=101, max_context=64)
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def parameters():
    return dict(Llama(CONFIG).init_weights(seed=3).named_parameters())


def with_gradients(named, seed=7):
    generator = torch.Generator().manual_seed(seed)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator)
    return named


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    named = with_gradients(parameters())
    optimizer = build_optimizer(named, "muon", **SETTINGS)
    optimizer.step()
    for name, p in named.items():
        muon = "momentum_buffer" in optimizer.state[p]
        assert muon == (p.ndim == 2 and ".layers." in name), name
        assert muon or "exp_avg_sq" in optimizer.state[p], name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


def test_muon_moves_a_matrix_by_a_nearly_orthogonal_one_of_adamws_size():
    """0.2 sqrt(max(m, n)) lr times U V^T of the gradient (arXiv 2502.16982, eq. 4): singular values near each other."""
    named = with_gradients(parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    before = named[name].detach().clone()
    build_optimizer(named, "muon", **SETTINGS | {"weight_decay": 0.0}).step()
    moved = (before - named[name].detach()) / (0.01 * 0.2 * 44**0.5)
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(named[name].grad, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(moved.flatten(), (left @ right).flatten(), dim=0) > 0.95


def test_together_steps_as_each_would_alone():
    alone, together = with_gradients(parameters()), with_gradients(parameters())
    rest = {n: p for n, p in alone.items() if p.ndim < 2 or ".layers." not in n}
    build_optimizer(rest, "adamw", **SETTINGS).step()
    build_optimizer(together, "muon", **SETTINGS).step()
    for name in rest:
        assert torch.equal(alone[name], together[name]), name


def test_norms_are_not_decayed_by_any():
    for kind in ("adamw", "adamw8bit", "muon"):
        named = parameters()
        for p in named.values():
            p.grad = torch.zeros_like(p)
        build_optimizer(named, kind, **SETTINGS).step()
        assert torch.equal(named["model.norm.weight"], torch.ones(44))
        assert named["lm_head.weight"].norm() < parameters()["lm_head.weight"].norm()


def test_an_adapter_without_matrices_in_blocks_is_left_to_adamw():
    named = {"head": nn.Parameter(torch.ones(3, 5))}
    assert isinstance(build_optimizer(named, "muon", **SETTINGS), torch.optim.AdamW)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_the_state_put_back_gives_the_same_next_step(kind):
    first, second = parameters(), parameters()
    one, two = build_optimizer(first, kind, **SETTINGS), build_optimizer(second, kind, **SETTINGS)
    with_gradients(first)
    one.step()
    for name, p in second.items():
        p.data.copy_(first[name])
        two.state[p] = {key: value.clone() for key, value in one.state[first[name]].items()}
    for named, optimizer in ((first, one), (second, two)):
        with_gradients(named, seed=11)
        optimizer.step()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("shape", ((19, 31), (31, 19)))
def test_muon_in_fp32_steps_as_torchs_does_in_bf16(shape):
    settings = dict(lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    one, other = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    start, optimizers = one.detach().clone(), (WideMuon([one], **settings), Muon([other], **settings))
    for seed in range(4):
        for optimizer, p in zip(optimizers, (one, other), strict=True):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2))
            optimizer.step()
    assert (one - other).norm() < 0.03 * (other - start).norm()
    assert torch.equal(*(o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (one, other), strict=True)))


def test_orthogonalised_brings_all_singular_values_near_one():
    matrix = torch.randn(23, 41, generator=torch.Generator().manual_seed(5))
    values = torch.linalg.svdvals(orthogonalised(matrix, (3.4445, -4.775, 2.0315), 5))
    assert values.min() > 0.5 and values.max() < 1.5
