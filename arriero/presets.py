"""Named configurations: plain functions that return one, to copy (`arriero cp`), run, or change in Python.

Where a preset follows a published setting, its docstring names the source. torchtune counts unpacked examples in a
batch; rows here are packed, so the same number of rows holds more examples.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arriero import settings
from arriero.errors import ConfigError, did_you_mean
from arriero.io.paths import as_path, expand, lies_here
from arriero.model.catalogue import LADDER
from arriero.model.lora_config import LoraConfig
from arriero.train.config import (
    DataConfig,
    LoopConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    SftConfig,
    TrainingStage,
)
from arriero.train.preference_config import DpoConfig, PreferenceDataConfig, RewardConfig
from arriero.train.recipes import RECIPES as TRAINING
from arriero.train.rejection_config import RejectionConfig, RejectionDataConfig
from arriero.train.rl_config import (
    GrpoConfig,
    PolicyConfig,
    PpoConfig,
    PromptConfig,
    RolloutConfig,
    ValueConfig,
)
from arriero.train.scaling.laws import FLOPS_PER_PARAMETER, TOKENS_PER_PARAMETER, suggested_batch, suggested_lr

if TYPE_CHECKING:
    from arriero.curate.config import CurateConfig


class _Recipes(Mapping[str, type]):
    """Each recipe's name and its class; that of curation is loaded when asked for, since its rules need numpy."""

    def __getitem__(self, name: str) -> type:
        if name != "curate":
            return TRAINING[name]
        from arriero.curate.config import CurateConfig

        return CurateConfig

    def __iter__(self) -> Iterator[str]:
        return iter([*TRAINING, "curate"])

    def __len__(self) -> int:
        return len(TRAINING) + 1


RECIPES: Mapping[str, type] = _Recipes()

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
        value=ValueConfig(gamma=1.0, gae_lambda=0.95, value_clip=0.2, whiten_scores=True),
        optim=OptimConfig(
            lr=1e-6, schedule="constant", warmup=0.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip=1.0
        ),
        loop=LoopConfig(precision="bf16", steps=400, batch_rows=512, micro_rows=8, recompute="full"),
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


def curate_web() -> CurateConfig:
    """Web pages as FineWeb keeps them (arXiv 2406.17557), with Llama 3's line and URL deduplication."""
    from arriero.curate.config import CurateConfig
    from arriero.curate.rules import C4Rules, FineWebRules

    return CurateConfig(
        on_error="skip",
        steps=(
            "normalise", "url-dedup", "exact-dedup", "language", "gopher-repetition", "gopher-quality", "c4", "fineweb",
            "ngram-coverage", "licence", "code", "line-dedup", "near-dedup", "scrub",
        ),
        # the thresholds of datatrove's examples/fineweb.py: all of C4's rules but that lines must end in punctuation
        c4=C4Rules(min_words=3, min_sentences=5, line_ends=()),
        fineweb=FineWebRules(max_dup_line_char_frac=0.01),
    )  # fmt: skip


def curate_prose() -> CurateConfig:
    """Books, speeches, manuals: texts that somebody edited. Duplicates, other languages and repetition go."""
    from arriero.curate.config import CurateConfig

    return CurateConfig(
        steps=("normalise", "language", "gopher-repetition", "licence", "code", "exact-dedup", "near-dedup", "scrub"),
    )


def curate_code() -> CurateConfig:
    """Source code as Llama 1 filters it (arXiv 2302.13971, 2.1): licence, line length, alphanumeric share."""
    from arriero.curate.config import CurateConfig

    return CurateConfig(
        steps=("normalise", "licence", "code", "exact-dedup", "near-dedup", "scrub"),
    )


def pretrain_llama1_7b() -> PretrainConfig:
    """Llama 1 7B: 1T tokens of seven sources (arXiv 2302.13971, tables 1 and 2). AdamW's eps is not published."""
    return _llama1("llama1-7b", 1.0e12, 3e-4)


def pretrain_llama1_13b() -> PretrainConfig:
    """Llama 1 13B: 1T tokens of seven sources (arXiv 2302.13971, tables 1 and 2). AdamW's eps is not published."""
    return _llama1("llama1-13b", 1.0e12, 3e-4)


def pretrain_llama1_33b() -> PretrainConfig:
    """Llama 1 33B: 1.4T tokens of seven sources (arXiv 2302.13971, tables 1 and 2). AdamW's eps is not published."""
    return _llama1("llama1-33b", 1.4e12, 1.5e-4)


def pretrain_llama1_65b() -> PretrainConfig:
    """Llama 1 65B: 1.4T tokens of seven sources (arXiv 2302.13971, tables 1 and 2). AdamW's eps is not published."""
    return _llama1("llama1-65b", 1.4e12, 1.5e-4)


def pretrain_llama2_7b() -> PretrainConfig:
    """Llama 2 7B: 2T tokens in rows of 4096 (arXiv 2307.09288, section 2.2). Its mixture is not published."""
    return _llama2("llama2-7b", 3e-4)


def pretrain_llama2_13b() -> PretrainConfig:
    """Llama 2 13B: 2T tokens in rows of 4096 (arXiv 2307.09288, section 2.2). Its mixture is not published."""
    return _llama2("llama2-13b", 3e-4)


def pretrain_llama2_70b() -> PretrainConfig:
    """Llama 2 70B: 2T tokens in rows of 4096 (arXiv 2307.09288, section 2.2). Its mixture is not published."""
    return _llama2("llama2-70b", 1.5e-4)


def pretrain_llama3_8b() -> PretrainConfig:
    """Llama 3 8B: 15T tokens at 3e-4 (arXiv 2407.21783, table 3).

    Warmup, the cosine's end and the ramp of batch and length are published for the 405B only, and taken from there.
    The mixture (general 50%, maths and reasoning 25%, code 17%, multilingual 8%) wants data sorted so: data.weights.
    """
    return _llama3("llama3-8b", 15e12, 3e-4)


def pretrain_llama3_70b() -> PretrainConfig:
    """Llama 3 70B: 15T tokens at 1.5e-4 (arXiv 2407.21783, table 3).

    Warmup, the cosine's end and the ramp of batch and length are published for the 405B only, and taken from there.
    """
    return _llama3("llama3-70b", 15e12, 1.5e-4)


def pretrain_llama3_405b() -> PretrainConfig:
    """Llama 3 405B: 15.6T tokens, 4M a batch at first, then 8M, then 16M (arXiv 2407.21783, section 3.4.1).

    The shape is Llama 3.1's, whose RoPE is scaled from the first step; when Meta began to scale it is not published.
    The stages to 128K tokens and the annealing that followed are runs of their own, from this one's model.
    """
    return _llama3("llama3.1-405b", 15.6e12, 8e-5)


def pretrain_llama3_2_1b() -> PretrainConfig:
    """The shape of Llama 3.2 1B, 9T tokens. Meta pruned it from the 8B and distilled it; nothing of how is published.

    Learning rate, warmup and batch here are Llama 3 8B's.
    """
    return _llama3("llama3.2-1b", 9e12, 3e-4)


def pretrain_llama3_2_3b() -> PretrainConfig:
    """The shape of Llama 3.2 3B, 9T tokens. Meta pruned it from the 8B and distilled it; nothing of how is published.

    Learning rate, warmup and batch here are Llama 3 8B's.
    """
    return _llama3("llama3.2-3b", 9e12, 3e-4)


def pretrain_long_llama2_7b() -> PretrainConfig:
    """Llama 2 7B goes on to rows of 32,768 with theta 500,000, as Llama 2 Long did (arXiv 2309.16039, section 2).

    400B tokens, 4M a batch as before, at 2e-5. Published is that long texts were upsampled, not by how much: see
    data.weights. Where its cosine ends is not published: a tenth, as Llama 2's.
    """
    base = _published("meta-llama/Llama-2-7b-hf", 400e9, 2e-5, seq_len=32_768, packing="concat", eps=1e-5)
    return dataclasses.replace(base, out="out/long-llama2-7b", rope_theta=5e5)


def pretrain_long_30m() -> PretrainConfig:
    """The 30M goes on to rows of 4096 with theta 100,000, ours: a twentieth of its tokens at a fifth of its rate."""
    base = pretrain_30m()
    loop = dataclasses.replace(base.loop, batch_rows=base.loop.batch_rows // 4, micro_rows=2)
    return dataclasses.replace(
        base,
        model="out/30m/model",
        out="out/long-30m",
        tokens=base.tokens / 20,
        rope_theta=1e5,
        data=dataclasses.replace(base.data, seq_len=4 * base.data.seq_len),
        optim=dataclasses.replace(base.optim, lr=base.optim.lr / 5),
        loop=loop,
    )


def pretrain_1m() -> PretrainConfig:
    """About 1M parameters, ours: an hour or so on a laptop's CPU."""
    return _ladder("1m", seq_len=512, micro_rows=16)


def pretrain_10m() -> PretrainConfig:
    """About 10M parameters, ours: a day on a good CPU, minutes on one GPU."""
    return _ladder("10m", seq_len=1024, micro_rows=8)


def pretrain_30m() -> PretrainConfig:
    """About 30M parameters, ours: days on a CPU, a quarter of an hour on one GPU."""
    return _ladder("30m", seq_len=1024, micro_rows=8)


def pretrain_qwen3_30m() -> PretrainConfig:
    """The 30M shape with Qwen3's QK-norm (arXiv 2505.09388), ours: to see what it does for a run."""
    return _ladder("qwen3-30m", seq_len=1024, micro_rows=8)


def pretrain_124m() -> PretrainConfig:
    """About 124M parameters, ours: hours on one GPU."""
    return _ladder("124m", seq_len=1024, micro_rows=8)


def pretrain_350m() -> PretrainConfig:
    """About 350M parameters, ours: half a day on one GPU of 80 GB, or an hour or two on eight."""
    return _ladder("350m", seq_len=2048, micro_rows=8)


def pretrain_1b() -> PretrainConfig:
    """About 1B parameters, ours: half a day on eight GPUs."""
    return _ladder("1b", seq_len=2048, micro_rows=8, recompute="selective")


PRESETS: dict[str, Callable[[], Any]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        sft_docstrings_demo,
        rejection_demo,
        rejection_llama2,
        lora_1b,
        lora_8b,
        lora_70b,
        full_1b,
        full_8b,
        full_llama2_7b,
        grpo_demo,
        grpo_paper,
        dapo,
        dr_grpo,
        gspo,
        ppo_llama2,
        dpo_llama3_8b,
        dpo_tulu3_8b,
        reward_llama2_7b,
        reward_llama3_8b,
        curate_web,
        curate_prose,
        curate_code,
        pretrain_1m,
        pretrain_10m,
        pretrain_30m,
        pretrain_qwen3_30m,
        pretrain_124m,
        pretrain_350m,
        pretrain_1b,
        pretrain_llama1_7b,
        pretrain_llama1_13b,
        pretrain_llama1_33b,
        pretrain_llama1_65b,
        pretrain_llama2_7b,
        pretrain_llama2_13b,
        pretrain_llama2_70b,
        pretrain_llama3_8b,
        pretrain_llama3_70b,
        pretrain_llama3_405b,
        pretrain_llama3_2_1b,
        pretrain_llama3_2_3b,
        pretrain_long_30m,
        pretrain_long_llama2_7b,
    )
}


def get(name: str) -> tuple[str, Any]:
    """The recipe's name and the configuration of a preset; raises `ConfigError` with near names."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}{did_you_mean(name, PRESETS)} (arriero ls presets lists them)")
    config = PRESETS[name]()
    recipe = next(recipe for recipe, cls in RECIPES.items() if cls is type(config))
    return recipe, config


def is_settings(word: str) -> bool:
    """Whether a word of a command line names settings rather than a model: a preset, or a TOML file.

    A directory of that name is a model.
    """
    if os.path.isdir(expand(word)):
        return word in PRESETS and not lies_here(word, "the preset")
    return word in PRESETS or word.endswith(".toml")


def load(name: str) -> tuple[str, Any]:
    """The recipe's name and the configuration of a preset or of a TOML file; raises `ConfigError`.

    A file of a preset's name is the file; a directory can be no settings.
    """
    path = as_path(name)
    if path.suffix in (".toml", ".json") or path.is_file():
        return settings.load_recipe(RECIPES, path)
    return get(name)


def without_absent_data(config: Any) -> Any:
    """The configuration of a preset that trains, without the data that it would read where they are not here."""
    if Path(config.data.train).exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=""))


def summary(name: str) -> str:
    """One line on what a preset is for."""
    return (inspect.getdoc(PRESETS[name]) or "").splitlines()[0]


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


# -- pretraining -------------------------------------------------------------------------------------------------

BATCH_4M = 2**22  # tokens
SHARDS = "out/shards"


def _llama1(model: str, tokens: float, lr: float) -> PretrainConfig:
    from arriero.data.mix import LLAMA1

    weights = {source: share for source, (share, _) in LLAMA1.items()}
    return _published(model, tokens, lr, seq_len=2048, packing="concat", weights=weights)


def _llama2(model: str, lr: float) -> PretrainConfig:
    return _published(model, 2.0e12, lr, seq_len=4096, packing="concat", eps=1e-5)


def _llama3(model: str, tokens: float, lr: float) -> PretrainConfig:
    """4M tokens a batch in rows of 4096; 8M in rows of 8192 after 252M tokens; 16M after 2.87T. Whole documents."""
    ramp = _ramp(tokens, BATCH_4M, [(252e6, 2 * BATCH_4M, 8192), (2.87e12, 4 * BATCH_4M, 8192)])
    return _published(model, tokens, lr, seq_len=4096, packing="best-fit", warmup=8000.0, min_lr=0.01, stages=ramp)


def _published(
    model: str,
    tokens: float,
    lr: float,
    *,
    seq_len: int,
    packing: Literal["best-fit", "concat"],
    weights: dict[str, float] | None = None,
    warmup: float = 2000.0,
    min_lr: float = 0.1,
    eps: float = 1e-8,
    stages: tuple[TrainingStage, ...] = (),
) -> PretrainConfig:
    """What all of Meta's have in common: AdamW (0.9, 0.95), decay 0.1, clipping at 1, a cosine, 4M tokens a batch.

    Ours: how often it saves and validates, and that all but matmuls and attention is computed again in the backward
    pass, as Llama 1 did (arXiv 2302.13971, section 2.4) and Llama 3 did not need to.
    """
    return PretrainConfig(
        model=model,
        out=f"out/{model}",
        tokens=tokens,
        data=PretrainDataConfig(train=SHARDS, seq_len=seq_len, packing=packing, weights=weights or {}),
        optim=OptimConfig(lr=lr, warmup=warmup, min_lr=min_lr, weight_decay=0.1, eps=eps),
        loop=LoopConfig(batch_rows=BATCH_4M // seq_len, recompute="selective", validate_every=5000, save_every=1000),
        stages=stages,
    )


def _ramp(tokens: float, batch_tokens: int, changes: Sequence[tuple[float, int, int]]) -> tuple[TrainingStage, ...]:
    """Stages of a run that begins with batches of `batch_tokens`; changes: (after tokens, batch in tokens, length)."""
    begins = [0.0, *(after for after, _, _ in changes), tokens]
    batches = [batch_tokens, *(batch for _, batch, _ in changes)]
    steps = [(end - begin) / batch for (begin, end), batch in zip(itertools.pairwise(begins), batches, strict=True)]
    return tuple(
        TrainingStage(start=sum(steps[: i + 1]) / sum(steps), batch_rows=batch // seq_len, seq_len=seq_len)
        for i, (_, batch, seq_len) in enumerate(changes)
    )


def _ladder(
    shape: str, seq_len: int, micro_rows: int, recompute: Literal["none", "selective"] = "none"
) -> PretrainConfig:
    """20 tokens a parameter (Chinchilla); learning rate and batch by DeepSeek LLM's laws for the FLOPs this makes.

    Muon, since it reaches AdamW's loss in about half the FLOPs (arXiv 2502.16982, abstract) at AdamW's rates, for 1 to
    4% more time a step here: 5 m FLOPs for a matrix of m rows against 1 for each token of the batch. WSD down to zero,
    so that a run can be made longer from its checkpoint before the decay.
    """
    params = LADDER[shape].n_params
    tokens = _digits(TOKENS_PER_PARAMETER * params)
    flops = FLOPS_PER_PARAMETER * params * tokens
    rows = 2 ** round(math.log2(suggested_batch(flops) / seq_len))
    return PretrainConfig(
        model=shape,
        out=f"out/{shape}",
        tokens=tokens,
        data=PretrainDataConfig(train=SHARDS, seq_len=seq_len),
        optim=OptimConfig("muon", lr=_digits(suggested_lr(flops)), schedule="wsd", min_lr=0.0, weight_decay=0.1),
        loop=LoopConfig(batch_rows=rows, micro_rows=micro_rows, recompute=recompute),
    )


def _digits(value: float) -> float:
    """Two significant digits: a setting for people to read."""
    return float(f"{value:.1e}")
