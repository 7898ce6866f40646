"""Writes a model with its matrices in few bits (`arriero quantize`).

The matrices of the blocks and the head are rounded (quant/rounding.py), one at a time; embeddings and norms stay
16 bits wide, since one row of the embeddings is read for a token. A head that was the embeddings becomes a matrix of
its own. What was written is read back by independent code and compared with the numbers chosen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.compressed import stored_entries
from arriero.checkpoint.convert import check_destination, tokenizer_to_write
from arriero.checkpoint.hf import LINEAR_ENDS, write_hf
from arriero.checkpoint.load import check_head, open_weights
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.source import resolve
from arriero.checkpoint.tensor_file import Entry
from arriero.checkpoint.verify import read_independently
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError, did_you_mean
from arriero.io.paths import as_path
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.quant.packed import Quantized
from arriero.quant.rounding import GROUP, nearest
from arriero.show.progress import Bar, progress

Kind = Literal["int8", "int4", "nf4"]


@dataclass(frozen=True)
class Rounded:
    """One matrix after rounding: its kind, and ||W' - W|| / ||W||."""

    name: str
    kind: str
    error: float


@dataclass(frozen=True)
class Quantization:
    """What was written.

    untied: whether the head was the embeddings before. matrices: in the order of the model. size: bytes of the tensors
    at 16 bits, and as written. per_token: bytes of weights that decoding one token reads, before and after.
    """

    out: Path
    untied: bool
    matrices: list[Rounded]
    size: tuple[int, int]
    per_token: tuple[int, int]


@dataclass
class _Work:
    """Rounds each matrix once, when the writer asks for it, and remembers what came of it."""

    weights: Weights
    kinds: Mapping[str, str]
    bar: Bar
    rounded: list[Rounded] = field(default_factory=list)
    sums: dict[str, int] = field(default_factory=dict)  # of the matrices multiplied out

    def packed(self, name: str) -> Quantized | None:
        if name not in self.kinds:
            return None
        weight = self.weights.read(name).float()
        matrix = nearest(weight, self.kinds[name])
        dense = matrix.dense()
        self.rounded.append(Rounded(name, self.kinds[name], float((dense - weight).norm() / weight.norm())))
        self.sums[name] = _checksum(dense)
        return matrix

    def shown(self, name: str) -> None:
        self.bar.say(name.removesuffix(".weight"))
        self.bar.advance(prod(self.weights.entries[name].shape))


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    type: Kind = "int8",
    keep_head: bool = False,
    chat_template: str = "",
    force: bool = False,
) -> Quantization:
    """Write `model` (path, Hub id or built-in name) at `out` with its matrices in `type`, as compressed-tensors.

    type: "int8" (a scale for each output), "int4" (for each 32 inputs) or "nf4" (for each 64; read by Arriero only).
    keep_head: leave the head as it is. chat_template: as in `convert`.
    Raises `CheckpointError` when `out` exists (unless `force`), when the model is quantised already, and when a width
    cannot be cut into groups. Nothing is left at `out` by a run that fails.
    """
    source, out = resolve(model), as_path(out)
    _check_request(source, out, type)
    check_destination(source, out, force)
    tokenizer = tokenizer_to_write(source, chat_template=chat_template)
    stored = open_weights(source)
    check_head(stored, "logits")
    if tokenizer is not None:
        check_rows(source, stored.config.vocab_size, tokenizer)
    weights = stored if keep_head else untied(stored)
    kinds = _kinds(weights, type, keep_head)
    dtype = torch.float16 if stored.dtype is torch.float16 else torch.bfloat16
    beside = read_beside(source, same_model=True)
    if tokenizer is not None and chat_template:
        beside = beside.for_training(tokenizer)
    with _bar(source, type, weights) as bar:
        work = _Work(weights, kinds, bar)
        write_hf(
            replace(weights, packed=work.packed),
            out,
            dtype=dtype,
            tokenizer=tokenizer,
            beside=beside,
            kinds=kinds,
            progress=work.shown,
            check=lambda written: _check(written, out, work.sums),
        )
    untied_now = stored.config.tied_embeddings and not keep_head
    return Quantization(out, untied_now, work.rounded, *_sizes(stored, weights, kinds, dtype))


def _check_request(source: Path, out: Path, kind: str) -> None:
    if kind not in get_args(Kind):
        known = get_args(Kind)
        raise CheckpointError(
            f"no type {kind!r} to quantise to; known are {', '.join(known)}{did_you_mean(kind, known)}"
        )
    if out.suffix == ".gguf" or out.is_file():
        raise CheckpointError(f"{out}: compressed-tensors is a directory; give the name of one")


@contextmanager
def _bar(source: Path, kind: str, weights: Weights) -> Iterator[Bar]:
    with progress(f"{source.name} -> {kind}", sum(prod(entry.shape) for entry in weights.entries.values())) as bar:
        yield bar


def untied(weights: Weights) -> Weights:
    """The same model with a head of its own, a copy of the embeddings where the two were one."""
    if not weights.config.tied_embeddings:
        return weights

    def embeddings(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda name, *rows: read(EMBEDDINGS if name == HEAD else name, *rows)

    return replace(
        weights,
        config=replace(weights.config, tied_embeddings=False),
        entries={**weights.entries, HEAD: weights.entries[EMBEDDINGS]},
        read=embeddings(weights.read),
        read_rows=None if weights.read_rows is None else embeddings(weights.read_rows),
    )


def _kinds(weights: Weights, kind: str, keep_head: bool) -> dict[str, str]:
    """The matrices that are rounded, each with its kind."""
    names = [name for name in weights.entries if name.endswith(LINEAR_ENDS) and not (keep_head and name == HEAD)]
    for name in names:
        if not weights.source.is_file() and weights.packed(name) is not None:
            raise CheckpointError(
                f"{weights.source}: quantised already ({name}); quantise the model that it was made from, for each "
                "rounding adds its own error"
            )
        n_in = weights.entries[name].shape[1]
        if kind in GROUP and n_in % GROUP[kind]:
            raise CheckpointError(
                f"{weights.source}: {name} has {n_in} inputs, and {kind} shares a scale among {GROUP[kind]} of a row; "
                "take --type int8, which has one for each row"
            )
    return dict.fromkeys(names, kind)


def _check(written: Path, out: Path, sums: Mapping[str, int]) -> None:
    """Read the matrices back by other means; each must be what was chosen, bit for bit."""
    reading = read_independently(written)
    for name, expected in sums.items():
        if _checksum(reading.read(name)) != expected:
            raise CheckpointError(
                f"{out}: not written: read back by other means, {name} is not what was chosen; this is a fault of "
                "Arriero's or of the disk: try again, and if it stays please report it"
            )


def _checksum(dense: Tensor) -> int:
    return zlib.crc32(dense.contiguous().numpy().data)


def _sizes(
    stored: Weights, weights: Weights, kinds: Mapping[str, str], dtype: torch.dtype
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of all tensors, and of those that a token reads; before (at 16 bits) and after."""

    def size(entry: Entry) -> int:
        return prod(entry.shape) * entry.dtype.itemsize

    before = {name: prod(entry.shape) * 2 for name, entry in stored.entries.items()}
    after = {
        name: sum(map(size, stored_entries(name, entry.shape, kinds[name], dtype).values()))
        if name in kinds
        else prod(entry.shape) * 2
        for name, entry in weights.entries.items()
    }
    row = weights.config.dim * 2

    def read(sizes: dict[str, int], tied: bool) -> int:
        return sum(sizes.values()) - (0 if tied else sizes[EMBEDDINGS] - row)

    totals = sum(before.values()), sum(after.values())
    return totals, (read(before, stored.config.tied_embeddings), read(after, weights.config.tied_embeddings))
