"""Pretraining: Meta's runs as far as they are published, and a ladder of small ones of our own."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from arriero.model.catalogue import LADDER
from arriero.train.config import LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig, TrainingStage
from arriero.train.scaling.laws import FLOPS_PER_PARAMETER, TOKENS_PER_PARAMETER, suggested_batch, suggested_lr

BATCH_4M = 2**22  # tokens
SHARDS = "out/shards"


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
