"""What every checkpoint format comes down to: a shape and named tensors, read one at a time.

Each reader (hf, meta, gguf) returns `Weights` whose names and layouts are Hugging Face's, and each writer takes
`Weights`, so n formats need n readers and n writers, not n^2 converters. Nothing is read before `read(name)` is
called and nothing is kept after, so a conversion holds one tensor and a load holds one model.

Rotary layouts: Hugging Face rotates the two halves of a head, Meta and GGUF adjacent pairs. Only the rows of q
and k differ, by the permutation in `to_halves` and `to_pairs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.tensor_file import Entry
from arriero.errors import CheckpointError
from arriero.model.build import empty_model
from arriero.model.config import LlamaConfig
from arriero.model.llama import HEAD, Llama


@dataclass(frozen=True)
class Weights:
    """A checkpoint of any format as the Hugging Face layout would have it, in the order of `names(config)`.

    source: the file or directory, for messages. read(name) returns a tensor of `entries[name]`'s shape and type
    that nothing else holds; read_rows(name, start, stop) likewise some of its rows, of formats that can.
    """

    source: Path
    config: LlamaConfig
    entries: Mapping[str, Entry]
    read: Callable[[str], Tensor]
    read_rows: Callable[[str, int, int], Tensor] | None = None

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


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this shape, by Hugging Face name; a tied head is not among them."""
    model = empty_model(config)
    return {
        name: tuple(p.shape) for name, p in model.named_parameters() if not (config.tied_embeddings and name == HEAD)
    }


def checked(
    source: Path,
    config: LlamaConfig,
    entries: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    read_rows: Callable[[str, int, int], Tensor] | None = None,
) -> Weights:
    """`Weights` of exactly the tensors that the shape calls for.

    Left out without complaint: rotary tables (`...rotary_emb.inv_freq`), which are computed here, and a head where
    the embeddings are tied. Raises `CheckpointError` naming missing, unexpected and mis-shaped tensors.
    """
    expected = expected_shapes(config)
    ignored = {HEAD, *(name for name in entries if name.endswith("rotary_emb.inv_freq"))}
    unexpected = [name for name in entries if name not in expected and name not in ignored]
    problems = [f"missing: {_some(missing)}"] if (missing := [n for n in expected if n not in entries]) else []
    if unexpected:
        problems.append(f"unexpected: {_some(unexpected)}")
    for name, shape in expected.items():
        if name in entries and entries[name].shape != shape:
            problems.append(f"{name} is {list(entries[name].shape)}, the config asks for {list(shape)}")
    if problems:
        raise CheckpointError(
            f"{source}: the tensors are not those of the Llama that its config describes; " + "; ".join(problems[:4])
        )
    return Weights(source, config, {name: entries[name] for name in expected}, read, read_rows)


def from_model(model: Llama) -> Weights:
    """View a model as `Weights`, without copying. The model must have no adapter in it."""
    state = model.state_dict()
    entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in state.items()}
    return checked(Path("model"), model.config, entries, lambda name: state[name].detach())


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
