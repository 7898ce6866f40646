"""Supervised fine-tuning: demonstrations, torchtune's settings, and Llama 2's own.

torchtune counts unpacked examples in a batch; rows here are packed, so the same number of rows holds more examples.
"""

from __future__ import annotations

from arriero.model.lora_config import LoraConfig
from arriero.train.config import DataConfig, LoopConfig, OptimConfig, SftConfig

TORCHTUNE_TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sft_docstrings_demo() -> SftConfig:
    """SmolLM2-135M learns to summarise Python functions, on a laptop's CPU; the data is built by `make demo`."""
    return SftConfig(
        model="smollm2-135m",
        out="demo/run",
        samples=4,
        data=DataConfig(train="demo/data/train.jsonl", validation="demo/data/validation.jsonl", seq_len=1024),
        optim=OptimConfig(lr=1e-3),
        loop=LoopConfig(steps=60, batch_rows=2, validate_every=60, save_every=20),
    )


def lora_1b() -> SftConfig:
    """LoRA on Llama 3.2 1B with torchtune's settings: rank 64, alpha 128, 3e-4."""
    return _lora("meta-llama/Llama-3.2-1B-Instruct", rank=64, alpha=128)


def lora_8b() -> SftConfig:
    """LoRA on Llama 3.1 8B with torchtune's settings: rank 8, alpha 16, 3e-4."""
    return _lora("meta-llama/Llama-3.1-8B-Instruct", rank=8, alpha=16)


def lora_70b() -> SftConfig:
    """LoRA on Llama 3.1 70B with torchtune's settings: rank 16, alpha 32, 3e-4."""
    return _lora("meta-llama/Llama-3.1-70B-Instruct", rank=16, alpha=32)


def full_1b() -> SftConfig:
    """Every weight of Llama 3.2 1B at torchtune's 2e-5."""
    return _full("meta-llama/Llama-3.2-1B-Instruct")


def full_8b() -> SftConfig:
    """Every weight of Llama 3.1 8B at torchtune's 2e-5; activations recomputed."""
    return _full("meta-llama/Llama-3.1-8B-Instruct")


def full_llama2_7b() -> SftConfig:
    """Llama 2's own fine-tuning: 2e-5, weight decay 0.1, 64 rows of 4096, two epochs (arXiv 2307.09288, 3.1)."""
    return SftConfig(
        model="meta-llama/Llama-2-7b-hf",
        out="out/full-llama2-7b",
        method="full",
        data=DataConfig(train="train.jsonl", seq_len=4096),
        optim=OptimConfig(lr=2e-5, weight_decay=0.1),
        loop=LoopConfig(epochs=2, batch_rows=64, recompute="full"),
    )


def _lora(model: str, rank: int, alpha: float) -> SftConfig:
    return SftConfig(
        model=model,
        out="out/lora",
        data=DataConfig(train="train.jsonl"),
        lora=LoraConfig(rank=rank, alpha=alpha, targets=TORCHTUNE_TARGETS),
        optim=OptimConfig(lr=3e-4, weight_decay=0.01),
        loop=LoopConfig(batch_rows=16, micro_rows=2, recompute="full"),
    )


def _full(model: str) -> SftConfig:
    return SftConfig(
        model=model,
        out="out/full",
        method="full",
        data=DataConfig(train="train.jsonl"),
        optim=OptimConfig(lr=2e-5),
        loop=LoopConfig(batch_rows=16, micro_rows=2, recompute="full"),
    )
