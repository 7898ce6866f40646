"""What a run would cost: `arriero plan`, and the same for recipes that learn from preferences and from own answers."""

from __future__ import annotations

from typing import Any

from arriero.show.terminal import output
from arriero.train.config import SftConfig
from arriero.train.preference_config import DpoConfig, OnlineDpoConfig, RewardConfig
from arriero.train.rl_config import GrpoConfig, PpoConfig


def plan(config: SftConfig) -> None:
    """Say what a run would cost: parameters, memory by part, tokens and time, from a short probe where data is given.

    Example:
        arriero plan llama3.1-8b --rank 8 --seq-len 4096 --recompute full
        arriero plan llama3.1-405b --method full --seq-len 8192 --batch-rows 2048 --tp 8 --pp 16 --dp-shard 64
        arriero plan smollm2-135m --data train.jsonl
        arriero plan pretrain-30m --data out/shards
    """
    _show(config)


def dpo(config: DpoConfig) -> None:
    """Say what `arriero dpo` would cost with the same arguments: memory by part, tokens and time.

    Example:
        arriero plan dpo smollm2-135m --data pairs.jsonl --nll 0.2
    """
    _show(config)


def online_dpo(config: OnlineDpoConfig) -> None:
    """Say what `arriero dpo online` would cost with the same arguments: engine and cache too; sampling, updates.

    Example:
        arriero plan dpo online smollm2-135m --data prompts.jsonl --reward numeric
    """
    _show(config)


def reward(config: RewardConfig) -> None:
    """Say what `arriero reward` would cost with the same arguments: memory by part, tokens and time.

    Example:
        arriero plan reward smollm2-135m --data pairs.jsonl
    """
    _show(config)


def grpo(config: GrpoConfig) -> None:
    """Say what `arriero grpo` would cost with the same arguments: engine, cache and reference too; sampling, updates.

    Example:
        arriero plan grpo smollm2-135m --data prompts.jsonl --reward exact --max-new-tokens 24
        arriero plan grpo llama3.1-8b --answers 16 --max-new-tokens 1024
    """
    _show(config)


def ppo(config: PpoConfig) -> None:
    """Say what `arriero ppo` would cost with the same arguments: value model, engine and cache too; sampling, updates.

    Example:
        arriero plan ppo smollm2-135m --data prompts.jsonl --reward numeric --max-new-tokens 24
        arriero plan ppo-llama2 --data prompts.jsonl
    """
    _show(config)


def _show(config: Any) -> None:
    from arriero.plan.run import plan as estimate

    output().print(estimate(config).table())
