"""Averages the weights of several runs of one stage (Llama 3, arXiv 2407.21783, 4.1.5; model soups, 2203.05482).

Models: each tensor is sum_i w_i W_i, added in fp32 and rounded once to the written type; tensor by tensor, so that
memory holds two tensors whatever the number of models. Adapters of one base: what an adapter adds is B A, and the mean
of products is not the product of means. The exact average is an adapter of the summed rank, whose A lies the A_i over
each other, and whose B the w_i s_i B_i beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.adapter import WEIGHTS, linears_of, read_adapter, save_adapter
from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.convert import check_destination, tensor_bar, tokenizer_to_write
from arriero.checkpoint.held import kind_of_base, write_kind
from arriero.checkpoint.hf import write_hf
from arriero.checkpoint.load import has_tokenizer, load_tokenizer_at, open_weights
from arriero.checkpoint.peft_config import read_peft_config
from arriero.checkpoint.source import resolve
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError, check
from arriero.io.paths import as_path
from arriero.model.build import empty_model
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.files import save_template


def average(
    sources: Sequence[str | Path],
    dst: str | Path,
    *,
    weights: Sequence[float] = (),
    base: str | Path = "",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write the average of `sources`, models or adapters (PEFT's layout), as a directory at `dst`; returns `dst`.

    weights: a positive number for each source, of which only the proportions count; () weighs all alike. base: the
    model that adapters were trained on; empty takes the name that the first one gives. dtype: of a written model; None
    keeps the first one's.
    Raises `CheckpointError` for sources that do not fit together, and where `dst` exists (unless `force`).
    """
    check(len(sources) >= 2, f"{len(sources)} model is given; an average is of two or more")
    check(
        not weights or len(weights) == len(sources),
        f"{len(weights)} weights are given for {len(sources)} models; give one for each, or none",
    )
    check(all(0 < w < math.inf for w in weights), f"weights are {list(weights)}; each must be a number above 0")
    paths, total = [resolve(source) for source in sources], math.fsum(weights) or 1.0
    parts = [w / total for w in weights] if weights else [1 / len(paths)] * len(paths)
    dst = as_path(dst)
    for path in paths:
        check_destination(path, dst, force)
    adapters = [(path / WEIGHTS).is_file() for path in paths]
    if all(adapters):
        _average_adapters(paths, parts, dst, base)
    elif any(adapters):
        raise CheckpointError(
            f"{paths[adapters.index(True)]} is an adapter and {paths[adapters.index(False)]} is none; merge it first"
        )
    else:
        _average_models(paths, parts, dst, dtype)
    return dst


def averaged(opened: Sequence[Weights], parts: Sequence[float]) -> Weights:
    """View checkpoints of one shape as their average."""
    first = opened[0]
    for other in opened[1:]:
        shapes = [{name: entry.shape for name, entry in w.entries.items()} for w in (first, other)]
        if shapes[0] != shapes[1] or first.head != other.head:
            raise CheckpointError(
                f"{other.source}: its tensors are not those of {first.source}; only models of one shape have an average"
            )
        if other.config != first.config:
            raise CheckpointError(
                f"{other.source}: its config differs from that of {first.source}, so equal weights would mean "
                "different things; average runs that began at one model"
            )

    def read(name: str) -> Tensor:
        total = opened[0].read(name).float().mul_(parts[0])
        for weights, part in zip(opened[1:], parts[1:], strict=True):
            total.add_(weights.read(name).float(), alpha=part)
        return total

    return replace(first, read=read, read_rows=None, packed=lambda name: None)


def _average_models(paths: Sequence[Path], parts: Sequence[float], dst: Path, dtype: torch.dtype | None) -> None:
    opened = [open_weights(path) for path in paths]
    mean = averaged(opened, parts)
    tokenizer = tokenizer_to_write(paths[0])
    if tokenizer is not None:
        for path in paths[1:]:
            if has_tokenizer(path) and load_tokenizer_at(path).fingerprint != tokenizer.fingerprint:
                raise CheckpointError(
                    f"{path}: its tokenizer differs from that of {paths[0]}; ids would mean other text"
                )
    beside = read_beside(paths[0])
    with tensor_bar(f"average of {len(paths)}", len(mean.entries)) as written:
        write_hf(mean, dst, dtype=dtype or opened[0].dtype, tokenizer=tokenizer, beside=beside, progress=written)


def _average_adapters(paths: Sequence[Path], parts: Sequence[float], dst: Path, base: str | Path) -> None:
    """The exact average, of the summed rank."""
    name = str(base) or read_peft_config(paths[0]).base
    if not name:
        raise CheckpointError(f"{paths[0]}: it does not say which model it was trained on; name that by --base")
    kinds = [kind_of_base(path) for path in paths]
    if len(set(kinds)) > 1:
        raise CheckpointError(f"the adapters were trained on bases held in {kinds}; average those of one kind")
    linears = linears_of(empty_model(open_weights(resolve(name)).config))
    read = [read_adapter(linears, path, base=name) for path in paths]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for linear in sorted({key.rpartition(".lora_")[0] for _, found in read for key in found}):
        a_parts, b_parts = [], []
        for part, (lora, found) in zip(parts, read, strict=True):
            a, b = found.get(f"{linear}.lora_A.weight"), found.get(f"{linear}.lora_B.weight")
            if a is None or b is None:
                continue  # this one leaves the matrix as it is: it adds 0
            rank, alpha = lora.rank_pattern.get(linear, lora.rank), lora.alpha_pattern.get(linear, lora.alpha)
            a_parts.append(a)
            b_parts.append(b * (part * lora.scale(rank, alpha)))
        tensors[f"{linear}.lora_A.weight"], tensors[f"{linear}.lora_B.weight"] = (
            torch.cat(a_parts),
            torch.cat(b_parts, 1),
        )
        ranks[linear] = tensors[f"{linear}.lora_A.weight"].shape[0]
    rank = max(ranks.values())
    others = {linear: r for linear, r in ranks.items() if r != rank}
    alike = len({lora.targets for lora, _ in read}) == 1
    lora = LoraConfig(
        rank=rank, alpha=float(rank), targets=read[0][0].targets if alike else tuple(ranks),
        rank_pattern=others, alpha_pattern={linear: float(r) for linear, r in others.items()},
    )  # fmt: skip

    def beside(directory: Path) -> None:
        if (tokenizer := tokenizer_to_write(resolve(name), adapter=paths[0])) is not None:
            save_template(tokenizer, directory)
        if kinds[0] is not None:
            write_kind(directory, kinds[0])

    save_adapter(tensors, dst, lora, name, beside)
