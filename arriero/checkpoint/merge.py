"""Folding an adapter into its model, and the proof that nothing was lost.

The merged model is read back from the disk and its logits are compared with those of model plus adapter: what is
checked is what will be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from arriero.checkpoint.adapter import load_adapter
from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.convert import check_destination
from arriero.checkpoint.files import replaced_directory
from arriero.checkpoint.hf import ALL_WEIGHTS, save_hf
from arriero.checkpoint.load import has_tokenizer, load_model, load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.errors import CheckpointError
from arriero.model.llama import Llama
from arriero.model.lora import merge_lora
from arriero.paths import as_path

# Largest difference allowed, relative to the largest logit: rounding of the merged weights, with room to spare.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class MergeReport:
    """How the merged model's logits differ from those of model plus adapter, over a fixed random input.

    max_difference: largest absolute difference of a logit. largest_logit: for scale. same_choice: share of positions
    whose most probable token is the same.
    """

    max_difference: float
    largest_logit: float
    same_choice: float


def merge(
    model_name: str | Path,
    adapter: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> MergeReport:
    """Fold `adapter` into the model, write the result as a Hugging Face directory at `dst`, and check it.

    dtype: type of the written weights; None keeps the model's stored type. Raises `CheckpointError` when `dst` exists
    (unless `force`), or when the written model's logits differ by more than rounding can explain.
    """
    source, dst = resolve(model_name), as_path(dst)
    check_destination(source, dst, force)
    model = load_model(source)
    dtype = dtype or model.lm_head.weight.dtype
    load_adapter(model, adapter, base=model_name)
    expected = _logits(model)
    merge_lora(model)
    with replaced_directory(dst, replaces=ALL_WEIGHTS) as temporary:
        tokenizer = load_tokenizer_at(source) if has_tokenizer(source) else None
        save_hf(model, temporary, tokenizer, dtype=dtype, beside=read_beside(source))
        del model
        report = _compare(_logits(load_model(temporary, dtype=torch.float32)), expected)
        if not report.max_difference <= _TOLERANCE[dtype] * report.largest_logit:
            raise CheckpointError(
                f"{dst}: not written: the merged model's logits differ by up to {report.max_difference:.3g} (the "
                f"largest is {report.largest_logit:.3g}) from those of model plus adapter; keep the adapter apart, or "
                "merge in float32"
            )
    return report


def _compare(actual: torch.Tensor, expected: torch.Tensor) -> MergeReport:
    return MergeReport(
        max_difference=float((actual - expected).abs().max()),
        largest_logit=float(expected.abs().max()),
        same_choice=float((actual.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


@torch.no_grad()
def _logits(model: Llama) -> torch.Tensor:
    """Logits of a fixed random input, fp32 [2, 64, V], computed in fp32 whatever the weights are stored in."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, min(64, model.config.max_context)), generator=generator)
    model.eval().set_compute_dtype(torch.float32)
    return model(tokens)
