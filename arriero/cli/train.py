"""Commands that train."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

from arriero import presets
from arriero.errors import TrainingError
from arriero.train.config import DistillConfig, PretrainConfig, SftConfig
from arriero.train.preference_config import DpoConfig, OnlineDpoConfig, RewardConfig
from arriero.train.rejection_config import RejectionConfig
from arriero.train.rl_config import GrpoConfig, OnPolicyDistillConfig, PpoConfig


def pretrain(config: PretrainConfig) -> None:
    """Pretrain MODEL, a shape such as 30m or a model to go on with, on token shards.

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero shard documents/ --tokenizer out/tokenizer --out out/shards
        arriero pretrain 30m --data out/shards --tokens 20e6 --out out/mine
        arriero pretrain pretrain-10m --data out/shards --tokens 20e6
    """
    start("pretrain", config)


def sft(config: SftConfig) -> None:
    """Fine-tune MODEL on the conversations in a file, with LoRA or in full.

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero sft smollm2-135m --data train.jsonl --out out/mine
        arriero sft my-llama --data rows.parquet --method full --lr 2e-5 --epochs 2
    """
    start("sft", config)


def rejection(config: RejectionConfig) -> None:
    """Fine-tune MODEL on the best of its own answers to prompts, in rounds; a stopped run goes on with --resume.

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero data build tasks chain-sum out/sums --size 2 --digits 2
        arriero rejection smollm2-135m --data out/sums/train.jsonl --validation out/sums/test.jsonl --reward numeric
        arriero rejection my-llama --data prompts.jsonl --reward python:mine.py:reward --rounds 3 --answers 16
    """
    start("rejection", config)


def distill(config: DistillConfig) -> None:
    """Fine-tune MODEL on conversations and, token by token, on what a larger TEACHER would have said.

    Example:
        arriero distill smollm2-135m --teacher out/larger/model --data train.jsonl --out out/distilled
        arriero distill small --teacher large --data rows.jsonl --method full --lr 2e-5 --divergence reverse
    """
    start("distill", config)


def on_policy_distill(config: OnPolicyDistillConfig) -> None:
    """Let MODEL answer prompts, and draw it to a larger TEACHER's probabilities at every token of its own answers.

    Example:
        arriero distill on-policy smollm2-135m --teacher out/larger/model --data prompts.jsonl --out out/student
        arriero distill on-policy small --teacher large --data prompts.jsonl --divergence symmetric --top-k 64
    """
    start("on_policy_distill", config)


def grpo(config: GrpoConfig) -> None:
    """Train MODEL on its own answers to prompts, scored by a reward, each against the others of its group.

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero grpo smollm2-135m --data prompts.jsonl --reward exact --max-new-tokens 24 --out out/mine
        arriero grpo my-llama --data prompts.jsonl --reward python:mine.py:reward --advantage rloo --kl 0.01
    """
    start("grpo", config)


def ppo(config: PpoConfig) -> None:
    """Train MODEL on its own answers to prompts, scored by a reward, with a value model that judges each token.

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero ppo smollm2-135m --data prompts.jsonl --reward numeric --max-new-tokens 24 --out out/mine
        arriero run ppo-llama2 --data prompts.jsonl --reward python:mine.py:reward
    """
    start("ppo", config)


def dpo(config: DpoConfig) -> None:
    """Train MODEL on preferences: answers of which one is better (DPO, IPO, KTO, SimPO, ORPO).

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero dpo smollm2-135m --data pairs.jsonl --out out/mine
        arriero dpo smollm2-135m --adapter out/sft/adapter --data pairs.jsonl --nll 0.2 --mask-format
    """
    start("dpo", config)


def online_dpo(config: OnlineDpoConfig) -> None:
    """Train MODEL on pairs of its own answers to prompts: those that a reward finds best against those it finds worst.

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero dpo online smollm2-135m --data prompts.jsonl --reward exact --max-new-tokens 24 --out out/mine
        arriero dpo online my-llama --data prompts.jsonl --reward model:out/reward/model --answers 8 --nll 0.2
    """
    start("online_dpo", config)


def reward(config: RewardConfig) -> None:
    """Train MODEL to score answers, from which of two is better.

    A preset, or a file that `arriero cp` wrote, may stand in MODEL's place.

    Example:
        arriero reward smollm2-135m --data pairs.jsonl --out out/reward
        arriero reward my-llama-chat --data rated.jsonl --margin small --safety 0.5 --also safety.jsonl
    """
    start("reward", config)


def start(recipe: str, config: Any) -> None:
    """Run a recipe."""
    finish(module_of(recipe).main(config))


def finish(outcome: Any) -> None:
    """End the process with the status of the signal that interrupted the training, if any did.

    Raises `TrainingError` where the trained model has no finite loss, so that no script continues with it.
    """
    if outcome is None:
        return
    if outcome.interrupted is not None:  # it is saved; the caller learns what ended it
        sys.exit(128 + outcome.interrupted)
    if outcome.result_loss is not None and not math.isfinite(outcome.result_loss):
        raise TrainingError(
            f"the run has ended, but the validation loss of what it wrote is {outcome.result_loss}: its weights are of "
            "no use; begin a new run with a lower lr, or precision fp32"
        )


def module_of(name: str) -> Any:
    """The module of a recipe: build(config, console) and main(config)."""
    assert name in presets.RECIPES, name
    return importlib.import_module(f"arriero.train.{name}")
