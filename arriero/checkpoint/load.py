"""Loads a model by name: built on the meta device, then filled with its tensors one at a time.

Peak memory is one model plus one tensor, whatever the format and the cast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arriero.checkpoint.adapter import load_adapter
from arriero.checkpoint.gguf import open_gguf
from arriero.checkpoint.held import held_in, kind_of_base
from arriero.checkpoint.hf import open_hf
from arriero.checkpoint.meta import open_meta
from arriero.checkpoint.rounded import rounded_in
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.source import resolve
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError
from arriero.io.gguf_header import read_metadata
from arriero.model.build import empty_model
from arriero.model.filed import file_linears
from arriero.model.llama import EMBEDDINGS, HeadKind, Llama
from arriero.model.packed import pack_linears
from arriero.quant.packed import Quantized
from arriero.show.terminal import warn_once
from arriero.tokenizer.load import TOKENIZER_FILES

if TYPE_CHECKING:
    from arriero.tokenizer.base import Tokenizer


def best_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_weights(path: Path) -> Weights:
    """Open a checkpoint of any known format: a .gguf file, a Hugging Face directory or a Meta directory."""
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    if (path / "config.json").is_file():
        return open_hf(path)
    if (path / "params.json").is_file():
        return open_meta(path)
    raise CheckpointError(
        f"{path}: no checkpoint known here; expected a .gguf file, or a directory with config.json and safetensors "
        "(Hugging Face), or with params.json and consolidated.*.pth (Meta)"
    )


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] = lambda name: None,
    quantization: str | None = None,
    head: HeadKind = "logits",
    packed: bool = False,
    quantize: str = "",
    filed: bool = False,
) -> Llama:
    """Load a model by path, Hub id or built-in name, ready for use (`.train()` for dropout).

    dtype: the type to hold the weights in; None keeps the stored one (quantised weights become fp32). quantization:
    "int8" or "nf4" rounds the matrices of the blocks as those formats hold them. head: what is wanted of the model.
    packed: hold matrices that are stored quantised as they are (model/packed.py), not multiplied out: to run them.
    quantize: hold all matrices so, those that are not quantised yet in the nearest codes of "int8" or "int4", which are
    cached (rounded.py).
    filed: leave the matrices in the file, for an `Engine` to read them one by one (model/filed.py).
    Raises `CheckpointError` when it is not found, damaged, or of an unknown architecture.
    """
    weights = held_in(open_weights(resolve(name_or_path)), quantization)
    check_head(weights, head)
    if quantize:
        weights, packed = rounded_in(weights, quantize, quantization), True
    dtype = dtype or weights.dtype
    model = empty_model(weights.config, head)
    if filed:
        file_linears(model, partial(_matrix, weights, packed, dtype), dtype)
    state, held = {}, dict[str, Quantized]()
    kept = dict(model.named_parameters())
    for name in weights.entries:
        if name not in kept and filed:
            continue
        progress(name)
        found = weights.read(name).to(dtype) if name == EMBEDDINGS else _matrix(weights, packed, dtype, name)
        if isinstance(found, Quantized):
            held[name] = found
        else:
            state[name] = found.to(device)
    pack_linears(model.to(dtype), lambda name, _: held.get(name))
    model.load_state_dict(state, assign=True, strict=False)  # a tied head is missing; `checked` has checked the others
    model.tie_weights()
    return model.to(device).eval() if held else model.eval()


def _matrix(weights: Weights, packed: bool, dtype: torch.dtype, name: str) -> Tensor | Quantized:
    matrix = weights.packed(name) if packed else None
    return weights.read(name).to(dtype) if matrix is None else matrix


def check_head(weights: Weights, wanted: HeadKind) -> None:
    """Refuse a model whose head is of another kind than wanted."""
    does = {"logits": "predicts the next token", "score": "scores a text", "value": "gives each token a value"}
    if weights.head != wanted:
        raise CheckpointError(
            f"{weights.source}: its head {does[weights.head]}, and a model is needed that {does[wanted]}; name another"
        )


def open_model(name_or_path: str | Path, dtype: torch.dtype, head: HeadKind = "logits") -> tuple[Llama, Weights]:
    """A model without memory yet, its weights to be of type `dtype`, and the checkpoint that has their values.

    For `parallelize`, whose `values` are `Weights.part`. head: of the model; a language model may get another one in
    the place of its own, which `Weights` does not have. Raises what `load_model` raises.
    """
    weights = open_weights(resolve(name_or_path))
    check_head(weights, "logits" if weights.head == "logits" else head)
    return empty_model(weights.config, head).to(dtype), weights


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    chat_template: str = "",
    quantize: str = "",
    filed: bool = False,
) -> tuple[Llama, Tokenizer]:
    """Load a model and its tokenizer by path, Hub id or built-in name, with a PEFT adapter on it when given.

    Matrices that are stored quantised are held so, except in fp32, which multiplies them out. An adapter that was
    trained on a quantised base gets its base's weights as that format holds them (held.py). chat_template: as in
    `load_tokenizer_at`.
    quantize, filed: as in `load_model`; the adapter's matrices are not rounded.
    """
    path = resolve(name)
    kind = None if adapter is None else kind_of_base(resolve(adapter))
    packed = dtype not in (None, torch.float32)
    model = load_model(
        path, dtype=dtype, device=device, quantization=kind, packed=packed, quantize=quantize, filed=filed
    )
    if adapter is not None:
        load_adapter(model, adapter, base=name)
    tokenizer = load_tokenizer_at(path, adapter=adapter, chat_template=chat_template)
    check_rows(path, model.config.vocab_size, tokenizer)
    return model, tokenizer


def has_tokenizer(path: Path) -> bool:
    """Whether the checkpoint at `path` brings a tokenizer."""
    if path.is_file():
        return "tokenizer.ggml.model" in read_metadata(path)
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer_at(path: Path, *, adapter: str | Path | None = None, chat_template: str = "") -> Tokenizer:
    """The tokenizer of the checkpoint at `path`, or that beside an adapter, with the chat template that is to be used.

    chat_template: a built-in template's name, one of the model's own by name, or a file; empty takes the adapter's,
    which it was trained with, and where that has none the model's.
    """
    from arriero.tokenizer import load_tokenizer  # here: a model alone needs no tokenizer library
    from arriero.tokenizer.files import read_chat_template
    from arriero.tokenizer.gguf import tokenizer_from_gguf
    from arriero.tokenizer.named_templates import named_template

    directory = None if adapter is None else resolve(adapter)
    if directory is not None and has_tokenizer(directory):
        tokenizer = _adapters_own(load_tokenizer(directory), directory, path)
    else:
        tokenizer = tokenizer_from_gguf(read_metadata(path)) if path.is_file() else load_tokenizer(path)
        if directory is not None and (own := read_chat_template(directory, tokenizer.special)) is not None:
            tokenizer.chat_template = own
    if chat_template:
        tokenizer.chat_template = named_template(chat_template, tokenizer)
    return tokenizer


def _adapters_own(own: Tokenizer, directory: Path, path: Path) -> Tokenizer:
    """The tokenizer beside an adapter, with what only the model's files have: further stop ids, a template."""
    if not has_tokenizer(path):
        return own
    base = load_tokenizer_at(path)
    if own.holds(base) and base.holds(own):
        own.stop_at(base.stop_ids)
    else:
        warn_once(
            f"{directory}: the tokenizer beside the adapter is used ({own.vocab_size:,} ids); that of {path} "
            f"({base.vocab_size:,} ids) gives other ids"
        )
    own.chat_template = own.chat_template or base.chat_template
    return own
