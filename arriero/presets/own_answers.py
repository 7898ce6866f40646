"""Learning from a model's own answers: rejection sampling, groups of answers, a value model."""

from __future__ import annotations

from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.rejection_config import RejectionConfig, RejectionDataConfig
from arriero.train.rl_config import (
    GrpoConfig,
    PolicyConfig,
    PpoConfig,
    PromptConfig,
    RolloutConfig,
    ValueConfig,
)


def rejection_demo() -> RejectionConfig:
    """SmolLM2-135M learns from its own right answers to sums (`arriero data build tasks chain-sum demo/sums`)."""
    return RejectionConfig(
        model="smollm2-135m",
        out="demo/rejection",
        reward="numeric",
        rounds=2,
        max_new_tokens=24,
        data=RejectionDataConfig(train="demo/sums/train.jsonl", validation="demo/sums/test.jsonl", seq_len=512),
        optim=OptimConfig(lr=5e-4),
        loop=LoopConfig(epochs=2, batch_rows=4),
    )


def rejection_llama2() -> RejectionConfig:
    """Rejection sampling as Llama 2 had it (arXiv 2307.09288, 3.2.3): best of all rounds, temperatures 1.2 and 1.3.

    K is not published (figure 7 shows 1 to 100), nor are the settings of this fine-tuning: here are those of its first.
    """
    return RejectionConfig(
        model="out/sft/model",
        out="out/rejection-llama2",
        method="full",
        reward="python:reward.py:reward",
        rounds=4,
        keep=1,
        answers=16,
        temperatures=(1.2, 1.3),
        max_new_tokens=1024,
        every_prompt=True,
        data=RejectionDataConfig(train="prompts.jsonl", seq_len=4096),
        optim=OptimConfig(lr=2e-5, weight_decay=0.1),
        loop=LoopConfig(epochs=2, batch_rows=64, recompute="full"),
    )


def grpo_demo() -> GrpoConfig:
    """SmolLM2-135M learns a small exact-answer task from its own answers, on a laptop's CPU."""
    return GrpoConfig(
        model="smollm2-135m",
        out="demo/grpo",
        reward="exact",
        data=PromptConfig(train="prompts.jsonl"),
        rollout=RolloutConfig(answers=8, max_new_tokens=24),
        policy=PolicyConfig(updates=1),
        optim=OptimConfig(lr=2e-4, schedule="constant", warmup=0.0),
        loop=LoopConfig(precision="fp32", steps=60, batch_rows=16, micro_rows=4),
    )


def grpo_paper() -> GrpoConfig:
    """GRPO with its paper's settings (arXiv 2402.03300, section 4.2): 64 answers, KL 0.04 in the loss, answers alike.

    Its estimator is k3, as published. The paper does not give the clip range, nor the steps: PPO's, and ours.
    """
    return GrpoConfig(
        model="meta-llama/Llama-3.2-1B-Instruct",
        method="full",
        data=PromptConfig(train="prompts.jsonl"),
        rollout=RolloutConfig(answers=64, max_new_tokens=1024),
        policy=PolicyConfig(normalise="answers", clip_high=0.2, kl=0.04, kl_in="loss", kl_kind="k3"),
        optim=OptimConfig(lr=1e-6, schedule="constant"),
        loop=LoopConfig(precision="bf16", steps=1000, batch_rows=16, micro_rows=1),
    )


def dapo() -> GrpoConfig:
    """DAPO (arXiv 2503.14476, section 4.1): clip-higher, dynamic sampling, tokens alike, overlong shaping, no KL."""
    return GrpoConfig(
        model="meta-llama/Llama-3.2-1B-Instruct",
        method="full",
        data=PromptConfig(train="prompts.jsonl"),
        rollout=RolloutConfig(
            answers=16, max_new_tokens=2560, truncated="score", overlong_margin=512, dynamic=3, temperature=1.0
        ),
        policy=PolicyConfig(clip_low=0.2, clip_high=0.28, updates=16),
        optim=OptimConfig(lr=1e-6, schedule="constant"),
        loop=LoopConfig(precision="bf16", steps=1000, batch_rows=512, micro_rows=1),
    )


def dr_grpo() -> GrpoConfig:
    """Dr. GRPO (arXiv 2503.20783, section 3): no division by the deviation, and none by an answer's length."""
    return GrpoConfig(
        model="meta-llama/Llama-3.2-1B-Instruct",
        method="full",
        advantage="centred",
        data=PromptConfig(train="prompts.jsonl"),
        rollout=RolloutConfig(answers=8, max_new_tokens=3000),
        policy=PolicyConfig(normalise="longest", clip_high=0.2),
        optim=OptimConfig(lr=1e-6, schedule="constant"),
        loop=LoopConfig(precision="bf16", steps=1000, batch_rows=128, micro_rows=1),
    )


def gspo() -> GrpoConfig:
    """GSPO (arXiv 2507.18071, section 5.1): one ratio for a whole answer, clipped to 3e-4 and 4e-4, four updates."""
    return GrpoConfig(
        model="meta-llama/Llama-3.2-1B-Instruct",
        method="full",
        data=PromptConfig(train="prompts.jsonl"),
        policy=PolicyConfig(loss="gspo", normalise="answers", clip_low=3e-4, clip_high=4e-4, updates=4),
        optim=OptimConfig(lr=1e-6, schedule="constant"),
        loop=LoopConfig(precision="bf16", steps=1000, batch_rows=64, micro_rows=1),
    )


def ppo_llama2() -> PpoConfig:
    """PPO as Llama 2 had it (arXiv 2307.09288, section 3.2.3), from the rejection-sampled model.

    Published: batch 512 in minibatches of 64, one pass, clip 0.2, KL weight 0.01 (7B and 13B; 0.005 for the larger),
    AdamW (0.9, 0.95, eps 1e-5), weight decay 0.1, clipping at 1.0, a constant rate of 1e-6, 200 to 400 iterations,
    whitened scores. Lambda, gamma, the value's learning rate and clipping are not: those here are ours.
    """
    return PpoConfig(
        model="out/rejection-llama2/model",
        out="out/ppo-llama2",
        method="full",
        reward="python:reward.py:reward",
        data=PromptConfig(train="prompts.jsonl"),
        rollout=RolloutConfig(answers=1, max_new_tokens=1024),
        policy=PolicyConfig(clip_high=0.2, kl=0.01, kl_in="reward", kl_kind="k1", updates=8),
        value=ValueConfig(
            value_lr=1e-6, warmup_steps=0, gamma=1.0, gae_lambda=0.95, value_clip=0.2, whiten_scores=True
        ),
        optim=OptimConfig(
            lr=1e-6, schedule="constant", warmup=0.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip=1.0
        ),
        loop=LoopConfig(precision="bf16", steps=400, batch_rows=512, micro_rows=8, recompute="full"),
    )
