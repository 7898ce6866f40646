"""Wraps a model for training, from outside and in one readable order: checkpoint activations, then compile.

The model's files know nothing of this. Sharding over processes will join here, after compile.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arriero.model.llama import Llama


def prepare(model: Llama, *, checkpoint_activations: bool = False, compile: bool = False) -> Llama:
    """Apply activation checkpointing and per-block compilation in place; names of parameters stay as they are.

    checkpoint_activations: keep only each block's input and recompute the block in the backward pass.
    compile: all blocks share one compiled graph, so the price is that of one block (about half a minute on a CPU).
    """
    for block in model.model.layers:
        if checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compile:
            block.compile()
    return model


def any_number_of_documents(cu_seqlens: Tensor) -> Tensor:
    """Tell the compiler that the next batch may hold more or fewer documents; the tensor itself is as it was."""
    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
    return cu_seqlens
