"""The objectives that recipes share."""

from __future__ import annotations

from torch import Tensor

from arriero.data.batch import Batch
from arriero.distributed.objective import Objective
from arriero.losses.lm import chunked_cross_entropy
from arriero.model.llama import Llama


def next_token(z_loss: float = 0.0, compile: bool = False) -> Objective:
    """Cross-entropy a trained token, in nats; z_loss, compile: `chunked_cross_entropy`'s."""

    def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
        hidden = model.model(batch.tokens, batch.layout)
        targets = batch.targets.flatten()
        loss = chunked_cross_entropy(hidden.flatten(0, 1), model.head.weight, targets, z_loss=z_loss, compile=compile)
        return {"loss": loss}

    return Objective(sums, lambda batch: {"loss": batch.n_trained})
