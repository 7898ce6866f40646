"""The common form of every checkpoint format: a shape, and named tensors that are read one at a time.

Each reader (hf, meta, gguf) returns `Weights` with Hugging Face's names and layouts, and each writer takes `Weights`,
so n formats need n readers and n writers instead of n^2 converters. A tensor is read when `read(name)` is called, and
is not kept, so a conversion holds one tensor and a load holds one model.

Rotary layouts: Hugging Face rotates the two halves of a head, Meta and GGUF adjacent pairs. Only the rows of q and k
differ, by the permutation in `to_halves` and `to_pairs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from arriero.checkpoint.tensor_file import Entry, check_finite
from arriero.errors import CheckpointError
from arriero.model.build import tensor_shapes
from arriero.model.config import LlamaConfig
from arriero.model.llama import EMBEDDINGS, HEAD, HeadKind, Llama
from arriero.quant.packed import Quantized
from arriero.show.terminal import warn_once

T = TypeVar("T")

_COMPARED = 1 << 22  # values of two matrices that are compared at a time


@dataclass(frozen=True)
class Weights:
    """A checkpoint of any format as the Hugging Face layout would have it, in the order of `names(config)`.

    source: the file or directory, for messages. read(name) returns a new tensor of `entries[name]`'s shape and type;
    read_rows(name, start, stop) some of its rows, where the format allows it. Both refuse NaN and infinite values.
    head: the kind of the model's head. packed(name): the codes and scales of a matrix that is stored quantised (`read`
    multiplies them out), None for every other tensor.
    """

    source: Path
    config: LlamaConfig
    entries: Mapping[str, Entry]
    read: Callable[[str], Tensor]
    read_rows: Callable[[str, int, int], Tensor] | None = None
    head: HeadKind = "logits"
    packed: Callable[[str], Quantized | None] = lambda name: None

    def part(self, name: str, _: Sequence[int], box: tuple[slice, ...]) -> Tensor:
        """The values of a tensor within `box`, a slice for each dimension; rows outside it are not read, if possible.

        For `parallelize`, of whose `Values` this is one.
        """
        if self.read_rows is None:
            return self.read(name)[box]
        rows, *columns = box
        return self.read_rows(name, rows.start, rows.stop)[(slice(None), *columns)]

    @property
    def dtype(self) -> torch.dtype:
        """The type that most parameters are stored in (quantised types count as what they are read as)."""
        sizes: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            sizes[entry.dtype] += prod(entry.shape)
        return sizes.most_common(1)[0][0]


def opened(
    source: Path,
    config: LlamaConfig,
    entries: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    read_rows: Callable[[str, int, int], Tensor] | None = None,
    head: HeadKind = "logits",
    packed: Callable[[str], Quantized | None] = lambda name: None,
) -> Weights:
    """`Weights` of a file, checked by `checked`, whose values are checked to be finite; decides whether they are tied.

    If the config says that head and embeddings are tied and the file has both, it is right where the two are equal;
    else they are kept apart, with a warning. If the file has a head only, it is used for both. (As in transformers.)
    """
    if config.tied_embeddings and HEAD in entries and EMBEDDINGS not in entries:
        entries = {EMBEDDINGS if name == HEAD else name: entry for name, entry in entries.items()}
        read, read_rows, packed = _renamed(read), _renamed(read_rows) if read_rows else None, _renamed(packed)

    def finite(name: str) -> Tensor:
        return check_finite(source, name, read(name))

    def finite_rows(name: str, start: int, stop: int) -> Tensor:
        assert read_rows is not None
        return check_finite(source, name, read_rows(name, start, stop))

    weights = Weights(source, config, entries, finite, finite_rows if read_rows else None)
    if config.tied_embeddings and HEAD in entries and not _equal(weights, EMBEDDINGS, HEAD):
        warn_once(
            f"{source}: the config says that head and embeddings are one (tie_word_embeddings is true), and the file "
            f"holds a {HEAD} that differs from {EMBEDDINGS}; the two are kept apart, as in transformers"
        )
        config = replace(config, tied_embeddings=False)
    return replace(checked(source, config, entries, finite, weights.read_rows, head), packed=packed)


def _renamed(read: Callable[..., T]) -> Callable[..., T]:
    return lambda name, *rows: read(HEAD if name == EMBEDDINGS else name, *rows)


def _equal(weights: Weights, a: str, b: str) -> bool:
    """Whether two matrices have the same values; a few rows of both are held at a time, where the format can."""
    shape = weights.entries[a].shape
    if weights.entries[b].shape != shape:
        return False
    rows = _COMPARED // max(1, prod(shape[1:])) + 1
    pieces = ((slice(i, min(i + rows, shape[0])), slice(None)) for i in range(0, shape[0], rows))
    return all(bool((weights.part(a, shape, box) == weights.part(b, shape, box)).all()) for box in pieces)


def check_sizes(source: Path, config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]], layers: str) -> None:
    """Refuse a config whose model is larger than the file can hold, before anything of such a size is made.

    shapes: of the file's tensors, by its own names, in which a layer's begin with `layers` and its number.
    """
    numbers = {name.removeprefix(layers).partition(".")[0] for name in shapes if name.startswith(layers)}
    found = sum(number.isdecimal() for number in numbers)
    if config.n_layers != found:
        raise CheckpointError(
            f"{source}: the config says {config.n_layers:,} layers, and the tensors are of {found:,}; one of the two "
            "is of another model: copy or download both again"
        )
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for what, size in {
        "vocabulary": config.vocab_size,
        "width": config.dim,
        "feed-forward width": config.ffn_dim,
        "heads times their width": config.n_heads * config.head_dim,
    }.items():
        if size > largest:
            raise CheckpointError(
                f"{source}: the config says {what} {size:,}, and no tensor is wider than {largest:,}; one of the two "
                "is of another model: copy or download both again"
            )


def checked(
    source: Path,
    config: LlamaConfig,
    entries: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    read_rows: Callable[[str, int, int], Tensor] | None = None,
    head: HeadKind = "logits",
) -> Weights:
    """`Weights` of exactly the tensors that the shape calls for.

    Left out without complaint: rotary tables (`...rotary_emb.inv_freq`), which are computed here, and a head where
    the embeddings are tied. Raises `CheckpointError` naming missing, unexpected and mis-shaped tensors.
    """
    expected = tensor_shapes(config, head)
    ignored = {HEAD, *(name for name in entries if name.endswith("rotary_emb.inv_freq"))}
    unexpected = [name for name in entries if name not in expected and name not in ignored]
    problems = [f"missing: {_some(missing)}"] if (missing := [n for n in expected if n not in entries]) else []
    if missing == [HEAD]:
        problems = [f"missing: {HEAD} (tie_word_embeddings is false: set it to true if the head is the embeddings)"]
    if unexpected:
        problems.append(f"unexpected: {_some(unexpected)}")
    for name, shape in expected.items():
        if name in entries and entries[name].shape != shape:
            problems.append(f"{name} is {list(entries[name].shape)}, the config asks for {list(shape)}")
    if problems:
        raise CheckpointError(
            f"{source}: the tensors are not those of the Llama that its config describes; " + "; ".join(problems[:4])
        )
    return Weights(source, config, {name: entries[name] for name in expected}, read, read_rows, head)


def from_model(model: Llama) -> Weights:
    """View a model as `Weights`, without copying. The model must have no adapter in it."""
    state = model.state_dict()
    entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in state.items()}
    return checked(Path("model"), model.config, entries, lambda name: state[name].detach(), head=model.head_kind)


def to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of q or k [n_heads*h, D] from adjacent pairs (Meta, GGUF) to halves (Hugging Face)."""
    return weight.view(n_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of q or k [n_heads*h, D] from halves (Hugging Face) to adjacent pairs (Meta, GGUF)."""
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """Number of heads in a tensor that RoPE acts on (q or k), None for every other tensor."""
    return {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.removesuffix(".weight").rsplit(".", 1)[-1])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
