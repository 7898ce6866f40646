"""Toy models for the engine, adapters for them, and steps of tokens that a test cuts up as it likes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.infer.blocks import blocks_for
from arriero.infer.engine import Engine
from arriero.infer.step import BLOCK, Step, StepInput
from arriero.model.build import build_model
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.base import Tokenizer

SHAPE = LlamaConfig(24, 2, 3, 1, 37, 101, 331, head_dim=10)
QWEN = Qwen3Config(**vars(SHAPE))
LORA = LoraConfig(rank=3, targets=("q_proj", "down_proj"))

Adapter = tuple[LoraConfig, dict[str, Tensor]]


def engine_toy(shape: LlamaConfig = SHAPE, dtype: torch.dtype = torch.float64, seed: int = 0) -> Llama:
    """A toy far from uniform; in fp64, so that what adds up in another order differs by far less than a mistake."""
    return build_model(shape).init_weights(std=0.2, seed=seed).requires_grad_(False).to(dtype).eval()


def adapter(seed: int, config: LoraConfig = LORA, shape: LlamaConfig = SHAPE) -> Adapter:
    """An adapter that changes much."""
    model = add_lora(engine_toy(shape), config)
    generator = torch.Generator().manual_seed(seed)
    return config, {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in lora_state(model).items()}


def adapted(model: Llama, given: Adapter) -> Llama:
    """Another model that carries the adapter."""
    other = build_model(model.config).requires_grad_(False).to(model.head.weight.dtype).eval()
    other.load_state_dict(model.state_dict())
    add_lora(other, given[0])
    for name, p in lora_state(other).items():
        p.data.copy_(given[1][name])
    return other


def small_engine(model: Llama, n_blocks: int, tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
    """An engine of that many blocks of cache."""
    return Engine(model, tokenizer, cache_tokens=n_blocks * BLOCK, **settings)


def pieces(rng: random.Random, lengths: Sequence[int], most: int) -> list[list[tuple[int, int, int]]]:
    """Steps that run sequences of these lengths to their ends: each a list of (sequence, start, end)."""
    done, steps = [0] * len(lengths), []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        step = []
        for s in rng.sample(range(len(lengths)), rng.randint(1, len(lengths))):
            if n := min(rng.choice((1, 1, rng.randint(1, most))), lengths[s] - done[s]):
                step.append((s, done[s], done[s] + n))
                done[s] += n
        if step:
            steps.append(step)
    return steps


def run_pieces(
    step: Step, ids: Sequence[Sequence[int]], steps: list[list[tuple[int, int, int]]], adapters: Sequence[str | None],
    rng: random.Random,
) -> list[Tensor]:  # fmt: skip
    """The logits of every token of each sequence, [n, V], run in these steps over blocks in random order."""
    free = list(range(step.n_blocks))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(blocks_for(len(s)))] for s in ids]
    logits: list[list[Tensor]] = [[] for _ in ids]
    for runs in steps:
        out = step(step_input(ids, tables, runs, adapters))
        at = 0
        for s, start, end in runs:
            logits[s].append(out[at : at + end - start])
            at += end - start
    return [torch.cat(rows) for rows in logits]


def step_input(
    ids: Sequence[Sequence[int]], tables: Sequence[Sequence[int]], runs: Sequence[tuple[int, int, int]],
    adapters: Sequence[str | None],
) -> StepInput:  # fmt: skip
    """One step of (sequence, start, end), all logits wanted."""
    width = max(blocks_for(end) for _, _, end in runs)
    table = np.full((len(runs), width), -1, dtype=np.int32)
    for row, (s, _, end) in enumerate(runs):
        table[row, : blocks_for(end)] = tables[s][: blocks_for(end)]
    lengths = [end - start for _, start, end in runs]
    return StepInput(
        np.array([i for s, start, end in runs for i in ids[s][start:end]], dtype=np.int64),
        np.array([p for _, start, end in runs for p in range(start, end)], dtype=np.int32),
        np.repeat(np.arange(len(runs), dtype=np.int32), lengths),
        table,
        np.arange(sum(lengths), dtype=np.int32),
        [adapters[s] for s, _, _ in runs],
    )
