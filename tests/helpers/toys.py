"""Toy models of every published shape: real ratios of heads, tying and RoPE, primes where these leave a choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from arriero.checkpoint.export import export_hf
from arriero.checkpoint.load import load_tokenizer_at
from arriero.distributed.engine import Engine
from arriero.model.build import build_model
from arriero.model.catalogue import PUBLISHED
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama, RMSNorm
from arriero.model.lora_config import LoraConfig

SIZES = {
    "llama1-7b": {"dim": 44, "n_heads": 11, "n_kv_heads": 11},
    "llama2-7b": {"dim": 52, "n_heads": 13, "n_kv_heads": 13},
    "llama2-70b": {"dim": 112, "n_heads": 14, "n_kv_heads": 2},
    "llama3-8b": {"dim": 96, "n_heads": 12, "n_kv_heads": 3},
    "llama3.1-8b": {"dim": 256, "n_heads": 8, "n_kv_heads": 2},
    "llama3.2-1b": {"dim": 256, "n_heads": 8, "n_kv_heads": 2},
    "smollm2-135m": {"dim": 72, "n_heads": 9, "n_kv_heads": 3},
}

LORAS = {
    "all": LoraConfig(rank=3, alpha=7.0),
    "rslora": LoraConfig(rank=5, alpha=5.0, dropout=0.25, targets=("q_proj", "v_proj"), rslora=True),
    "patterns": LoraConfig(
        rank=3,
        alpha=7.0,
        targets=("up_proj", "layers.1.mlp.down_proj"),
        rank_pattern={"model.layers.2.mlp.up_proj": 2},
        alpha_pattern={"model.layers.0.mlp.up_proj": 11.0},
    ),
}


def toy_config(family: str, ffn_dim: int = 107) -> LlamaConfig:
    """The shape of the family, small: three layers, 211 tokens."""
    sizes = SIZES[family]
    head_dim = sizes["dim"] // sizes["n_heads"]
    return replace(PUBLISHED[family], **sizes, n_layers=3, ffn_dim=ffn_dim, vocab_size=211, head_dim=head_dim)


def toy_model(of: str | LlamaConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """A model of a family or shape. Its weights are random, norms' too, so that no tensor can stand in for another."""
    model = build_model(toy_config(of) if isinstance(of, str) else of).init_weights(std=0.15, seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
    model.to(dtype).tie_weights()
    return model.eval()


def equal_weights(a: Llama, b: Llama) -> bool:
    """Whether names, types and every bit of every tensor are equal."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return all(t.dtype == right[name].dtype and torch.equal(t, right[name]) for name, t in left.items())


def toy_directory(folder: Path, tokenizer_of: Path) -> Path:
    """A model of 64 wide, far from uniform, with the tokenizer of a real one: a Hugging Face directory in fp32."""
    tokenizer = load_tokenizer_at(tokenizer_of)
    model = build_model(LlamaConfig(64, 2, 4, 2, 96, tokenizer.vocab_size, 1024)).init_weights(std=0.2, seed=3)
    export_hf(Engine.alone(model), folder, tokenizer, dtype=torch.float32)
    return folder
