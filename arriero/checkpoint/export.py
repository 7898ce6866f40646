"""Writes a model in training as a Hugging Face directory, tensor by tensor, from any number of processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.beside import NOTHING, Beside
from arriero.checkpoint.hf import write_hf
from arriero.checkpoint.tensor_file import Entry
from arriero.checkpoint.weights import Weights
from arriero.distributed.engine import Engine
from arriero.model.build import tensor_shapes
from arriero.tokenizer.base import Tokenizer


def export_hf(
    engine: Engine,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype,
    beside: Beside = NOTHING,
) -> None:
    """Write the current weights, adapters merged; process 0 writes, and every process has to call it.

    Process 0 holds one tensor at a time. Other arguments as `write_hf`'s.
    """
    tensors, model = engine.dense_tensors(), engine.model

    def read(name: str) -> Tensor:
        found, tensor = next(tensors)
        assert found == name, "both go in the order of tensor_shapes"
        return tensor

    if engine.mesh.rank == 0:
        entries = {n: Entry(shape, dtype) for n, shape in tensor_shapes(model.config, model.head_kind).items()}
        weights = Weights(directory, model.config, entries, read, head=model.head_kind)
        write_hf(weights, directory, dtype=dtype, tokenizer=tokenizer, beside=beside)
    for _ in tensors:
        pass  # the other processes yield nothing, but take part
