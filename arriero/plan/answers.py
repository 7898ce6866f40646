"""What a run that learns from its own answers holds beside what is trained: engine, cache, reference, value model.

All exact but the engine's bf16 weights on a CPU, which its kernels hold in twelve bits where that loses nothing
(infer/native_step.py). A new adapter's reference is the policy without it, so it takes no memory; a value model is a
second adapter, and a head, on the policy's own frozen base, where one process trains (train/ppo.py).
"""

from __future__ import annotations

from arriero.infer.blocks import blocks_for
from arriero.infer.step import BLOCK
from arriero.model.config import LlamaConfig
from arriero.train.rl_config import PpoConfig, RlConfig

WIDE = 4  # bytes of fp32
TWELVE_BITS = 1.5


def group_tokens(config: RlConfig, prompt: int) -> int:
    """Tokens of a row: the answers that are learned from, behind their prompt of so many tokens."""
    return prompt + config.learned * config.rollout.longest


def held_parts(
    shape: LlamaConfig, config: RlConfig, *, trained: int, moments: int, prompt: int, native: bool
) -> dict[str, int]:
    """Bytes by part. trained: parameters of the policy's that are; moments: bytes of the optimizer's. prompt: tokens of
    the longest one. native: whether the engine computes by its own kernels, which lay the weights out anew.
    """
    wide = WIDE if config.loop.precision == "fp32" else 2
    lora = config.method == "lora"
    new = lora and not config.adapter
    table = shape.vocab_size * shape.dim
    own = (WIDE if wide == WIDE else TWELVE_BITS) if native else wide
    tokens = config.rollout.at_once * blocks_for(prompt + config.rollout.longest) * BLOCK
    parts = {"reference, the policy without its adapter" if new else "reference": 0 if new else WIDE * trained}
    if isinstance(config, PpoConfig):
        parts["value model" + (", an adapter and a head on the same base" if lora else "")] = (
            2 * WIDE * (trained + shape.dim) + moments + (0 if lora else -2 * WIDE * table)
        )
    if native:
        parts["engine's weights, as its kernels have them"] = int(shape.n_params * own) + (0 if lora else wide * table)
    else:
        parts["engine's weights" + (", the policy's own" if lora else "")] = 0 if lora else int(shape.n_params * own)
    cached = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * wide
    return {**parts, "KV cache": tokens * cached}
