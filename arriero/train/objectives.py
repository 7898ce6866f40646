"""The objectives that recipes share: the loss of one batch, summed over its trained tokens."""

from __future__ import annotations

from torch import Tensor, nn

from arriero.data.batch import Batch
from arriero.losses.lm import chunked_cross_entropy
from arriero.model.llama import Llama


def lm_loss(model: nn.Module, batch: Batch, z_loss: float = 0.0, compile: bool = False) -> Tensor:
    """Sum of -log p(next token) over the batch's trained tokens, fp32; z_loss, compile: `chunked_cross_entropy`'s."""
    assert isinstance(model, Llama)
    hidden = model.model(batch.tokens, batch.layout)
    return chunked_cross_entropy(
        hidden.flatten(0, 1), model.lm_head.weight, batch.targets.flatten(), z_loss=z_loss, compile=compile
    )
