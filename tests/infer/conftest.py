"""Toy Llamas whose sizes fill no vector exactly, and the real tokenizer."""

from __future__ import annotations

import pytest
import torch

from arriero.infer import native_step
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.scaling import Llama3Scaling, YarnScaling
from arriero.tokenizer import load_tokenizer

TOYS = {
    "gqa": LlamaConfig(54, 3, 6, 2, 71, 101, 211, head_dim=22),
    "mha": LlamaConfig(39, 2, 3, 3, 101, 103, 211, head_dim=34, norm_eps=1e-6),
    "mqa": LlamaConfig(70, 2, 5, 1, 128, 107, 211, head_dim=32, tied_embeddings=True),
    "scaled": LlamaConfig(96, 2, 3, 1, 193, 109, 509, rope_scaling=Llama3Scaling(8.0, original_context=31)),
    "yarn": LlamaConfig(96, 2, 3, 1, 193, 109, 509, rope_scaling=YarnScaling(16.0, 7)),
}


def toy(name: str, seed: int = 0) -> Llama:
    """A toy with weights large enough that attention and logits are far from uniform."""
    return Llama(TOYS[name]).init_weights(std=0.2, seed=seed).requires_grad_(False)


@pytest.fixture(params=list(TOYS))
def model(request) -> Llama:
    return toy(request.param)


@pytest.fixture(scope="session")
def toys():
    """A toy by name and seed."""
    return toy


@pytest.fixture
def gqa() -> Llama:
    return toy("gqa")


@pytest.fixture(scope="session")
def tokenizer(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="session")
def native():
    """The compiled kernels: this project's machines have a compiler, so their absence is a failure."""
    library = native_step.load_library()
    assert library is not None, "the C++ step did not compile here"
    return library


@pytest.fixture
def ids():
    """Ragged prompts of a toy vocabulary."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(20, 101, (n,), generator=generator).tolist() for n in (7, 19, 1, 13, 3)]
