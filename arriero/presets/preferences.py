"""Direct preference optimisation and reward models."""

from __future__ import annotations

from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.preference_config import DpoConfig, PreferenceDataConfig, RewardConfig


def dpo_llama3_8b() -> DpoConfig:
    """Llama 3's DPO (arXiv 2407.21783, 4.1.4): 1e-5, beta 0.1, format tokens masked, NLL 0.2; the batch is ours."""
    return DpoConfig(
        model="meta-llama/Llama-3.1-8B-Instruct",
        out="out/dpo-llama3-8b",
        method="full",
        beta=0.1,
        nll=0.2,
        mask_format=True,
        data=PreferenceDataConfig(train="preferences.jsonl", seq_len=4096, ratings=("significantly better", "better")),
        optim=OptimConfig(lr=1e-5),
        loop=LoopConfig(epochs=1, batch_rows=32, recompute="full"),
    )


def dpo_tulu3_8b() -> DpoConfig:
    """Tulu 3's length-normalised DPO (arXiv 2411.15124, section 5.1): beta 5, 5e-7, linear, warmup 0.1."""
    return DpoConfig(
        model="meta-llama/Llama-3.1-8B-Instruct",
        out="out/dpo-tulu3-8b",
        method="full",
        loss="sigmoid-norm",
        beta=5.0,
        data=PreferenceDataConfig(train="preferences.jsonl", seq_len=2048),
        optim=OptimConfig(lr=5e-7, schedule="linear", warmup=0.1, min_lr=0.0),
        loop=LoopConfig(epochs=1, batch_rows=128, recompute="full"),
    )


def reward_llama2_7b() -> RewardConfig:
    """Llama 2's helpfulness reward model (arXiv 2307.09288, 3.2.2): one epoch, 1e-5, small margins.

    A step takes rows, which hold several pairs of short answers: 128 rows of 4096 tokens are ours.
    """
    return RewardConfig(
        model="meta-llama/Llama-2-7b-chat-hf",
        out="out/reward-llama2-7b",
        method="full",
        margin="small",
        data=PreferenceDataConfig(train="preferences.jsonl", seq_len=4096),
        optim=OptimConfig(lr=1e-5, warmup=0.03, min_lr=0.1),
        loop=LoopConfig(epochs=1, batch_rows=128, recompute="full"),
    )


def reward_llama3_8b() -> RewardConfig:
    """Llama 3's reward model (arXiv 2407.21783, 4.1.2): from the base, no margin, the upper two ratings; lr is ours."""
    return RewardConfig(
        model="meta-llama/Llama-3.1-8B",
        out="out/reward-llama3-8b",
        method="full",
        chat_template="llama3",
        data=PreferenceDataConfig(train="preferences.jsonl", seq_len=4096, ratings=("significantly better", "better")),
        optim=OptimConfig(lr=1e-5),
        loop=LoopConfig(epochs=1, batch_rows=64, recompute="full"),
    )
