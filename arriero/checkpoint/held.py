"""The quantised base that an adapter was trained on (`arriero sft --quantize`).

An adapter fits the rounded weights that it was trained on; on the original ones it acts slightly differently. So
base_quantization.json beside an adapter names the format, and commands that load the adapter on its base (chat, eval,
merge) round the base likewise, unless told otherwise. PEFT's files have no entry for it; a program that does not know
the file puts the adapter on the original weights, as is common with QLoRA.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError, did_you_mean
from arriero.io.files import write_json
from arriero.io.reading import read_json
from arriero.model.lora_config import LINEARS
from arriero.quant.formats import FORMATS

FILE = "base_quantization.json"


def write_kind(directory: Path, kind: str) -> None:
    """Say beside an adapter how its base was held."""
    write_json(directory / FILE, {"format": kind})


def kind_of_base(adapter: Path) -> str | None:
    """The format that the base of an adapter was held in; None: as it is."""
    if not (adapter / FILE).is_file():
        return None
    kind = read_json(adapter / FILE).get("format")
    if kind not in tuple(FORMATS):
        near = did_you_mean(kind, FORMATS) if isinstance(kind, str) else ""
        raise CheckpointError(f"{adapter / FILE}: format is {kind!r}; known are {', '.join(FORMATS)}{near}")
    return str(kind)


def held_in(weights: Weights, kind: str | None) -> Weights:
    """`weights` as a format holds them: the matrices of the blocks rounded to its codes and scales, the rest as is."""
    if kind is None:
        return weights
    endings = tuple(f".{name}.weight" for name in LINEARS)

    @torch.no_grad()
    def read(name: str) -> Tensor:
        weight = weights.read(name)
        return FORMATS[kind].rounded(weight) if name.endswith(endings) else weight

    return replace(weights, read=read, read_rows=None, packed=lambda name: None)
