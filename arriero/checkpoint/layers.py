"""Runs texts through a model one layer at a time, straight from its file: the model never lies in memory whole.

What is held is one layer (fp32) and the hidden states of all texts between two layers.
Shapes: B rows, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from arriero.checkpoint.weights import Weights
from arriero.model.build import empty_model
from arriero.model.config import LlamaConfig
from arriero.model.layout import Rows
from arriero.model.llama import EMBEDDINGS, Block, RMSNorm
from arriero.model.rope import rope_tables

Read = Callable[[str], Tensor]


@torch.no_grad()
def embedded(weights: Weights, texts: Sequence[Tensor]) -> list[Tensor]:
    """The embeddings [B, T, D] of each of several batches of ids [B, T], fp32."""
    table = weights.read(EMBEDDINGS)
    return [table[ids].float() for ids in texts]


def block_of(config: LlamaConfig, layer: int, read: Read) -> Block:
    """One layer of a model, fp32; read(name): a tensor of the model."""
    block = empty_model(replace(config, n_layers=1)).model.layers[0]
    assert isinstance(block, Block)
    state = {name: read(f"model.layers.{layer}.{name}").float() for name in block.state_dict()}
    block.load_state_dict(state, assign=True)
    return block.eval()


@torch.no_grad()
def run(block: Block, config: LlamaConfig, layer: int, x: Tensor) -> Tensor:
    """Hidden states [B, T, D] after a layer; each row is one document."""
    layout = Rows.of(x[:, :, 0])
    return block(x, rope_tables(config, layout.positions), layout.attention(layer))


@torch.no_grad()
def normed(weights: Weights, x: Tensor) -> Tensor:
    """Hidden states as the head is given them."""
    norm = RMSNorm(weights.config.dim, weights.config.norm_eps)
    norm.weight.copy_(weights.read("model.norm.weight"))
    return norm(x)
