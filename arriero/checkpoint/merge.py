"""Merges an adapter into its model, and verifies the result.

One tensor at a time, each weight that the adapter acts on becomes W + s B A, added in fp32 and rounded once to the
written type; W is what the adapter was trained on (held.py). The written files are then read by independent code and
compared with the files of model and adapter (`verify.py`).
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.adapter import linears_of, read_adapter
from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.convert import check_destination, tensor_bar, tokenizer_to_write
from arriero.checkpoint.held import held_in, kind_of_base
from arriero.checkpoint.hf import write_hf
from arriero.checkpoint.load import check_head, open_weights
from arriero.checkpoint.quantize import matrices_in, write_rounded
from arriero.checkpoint.rounded import untied
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.source import resolve
from arriero.checkpoint.verify import Verdict, check_written
from arriero.checkpoint.weights import Weights
from arriero.io.paths import as_path
from arriero.model.build import empty_model
from arriero.model.lora_config import LoraConfig
from arriero.show.progress import progress as progress_bar


def merge(
    model_name: str | Path,
    adapter: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    chat_template: str = "",
    original_base: bool = False,
    quantize: str = "",
    force: bool = False,
) -> Verdict:
    """Fold `adapter` into the model, write the result as a Hugging Face directory at `dst`, and check it.

    An adapter that was trained on a quantised base is folded into the base as it was held in training, which
    `Verdict.base` names, or with `original_base` into the model's own weights.

    quantize: "int8" or "int4" writes the matrices of the result in the nearest codes, as `arriero quantize` would (the
    largest difference is then ||W' - W|| / ||W||).
    dtype: type of the written weights; None keeps the model's stored type. chat_template: what is written as the
    result's (a name or file, as in `load_tokenizer_at`); empty writes the one that the adapter was trained with.
    Raises `CheckpointError` when `dst` exists (unless `force`), or when a written tensor is not W + s B A to within
    rounding; nothing is left at `dst` then.
    """
    source, directory, dst = resolve(model_name), resolve(adapter), as_path(dst)
    check_destination(source, dst, force)
    kind = None if original_base else kind_of_base(directory)
    weights = held_in(open_weights(source), kind)
    check_head(weights, "logits")
    linears = linears_of(empty_model(weights.config))
    folded = merged(weights, *read_adapter(linears, directory, base=model_name))
    dtype, verdicts = dtype or weights.dtype, []

    def check(written: Path) -> None:
        verdicts.append(check_written(source, written, dtype, adapter=directory, held=kind, called=dst))

    tokenizer = tokenizer_to_write(source, adapter=directory, chat_template=chat_template)
    if tokenizer is not None:
        check_rows(source, weights.config.vocab_size, tokenizer)
    beside = read_beside(source) if tokenizer is None else read_beside(source).for_training(tokenizer)
    title = f"{source.name} + {directory.name}"
    if quantize:
        folded = untied(folded)
        kinds = matrices_in(folded, quantize)
        kept = torch.float16 if dtype is torch.float16 else torch.bfloat16
        with progress_bar(title, sum(prod(entry.shape) for entry in folded.entries.values())) as bar:
            rounded = write_rounded(folded, dst, kinds, "compressed-tensors", kept, tokenizer, beside, bar)
        return Verdict(len(folded.entries), max(matrix.error for matrix in rounded), kind)
    with tensor_bar(title, len(weights.entries)) as progress:
        write_hf(folded, dst, dtype=dtype, tokenizer=tokenizer, beside=beside, progress=progress, check=check)
    return verdicts[0]


def merged(weights: Weights, lora: LoraConfig, tensors: dict[str, Tensor]) -> Weights:
    """View `weights` with an adapter folded in: W + s B A in fp32 where it acts. lora, tensors: as `read_adapter`'s."""

    def read(name: str) -> Tensor:
        weight, linear = weights.read(name), name.removesuffix(".weight")
        a, b = tensors.get(f"{linear}.lora_A.weight"), tensors.get(f"{linear}.lora_B.weight")
        if a is None or b is None:
            return weight
        rank, alpha = lora.rank_pattern.get(linear, lora.rank), lora.alpha_pattern.get(linear, lora.alpha)
        return weight.float() + lora.scale(rank, alpha) * (b @ a)

    return replace(weights, read=read, read_rows=None, packed=lambda name: None)
