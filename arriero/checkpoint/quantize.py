"""Writes a model with its matrices in few bits (`arriero quantize`).

The matrices of the blocks and the head are rounded, one at a time, to the nearest code (quant/rounding.py) or by what a
text makes them multiply (calibrate.py), and written as compressed-tensors or GGUF. Embeddings and norms stay 16 bits
wide, since one row of the embeddings is read for a token; a head that was the embeddings becomes a matrix of its own.
What was written is read back by independent code and compared with the numbers chosen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Literal, get_args

import gguf
import torch
from torch import Tensor

from arriero.checkpoint.beside import Beside, read_beside
from arriero.checkpoint.calibrate import Calibration, calibration_rows
from arriero.checkpoint.compressed import stored_entries
from arriero.checkpoint.convert import check_destination, tokenizer_to_write, write_gguf_file
from arriero.checkpoint.gguf import Kind as Kinds
from arriero.checkpoint.gguf_blocks import KINDS
from arriero.checkpoint.hf import LINEAR_ENDS, write_hf
from arriero.checkpoint.load import check_head, open_weights
from arriero.checkpoint.rounded import check_width, untied
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.sensitivity import costs, widened
from arriero.checkpoint.source import resolve
from arriero.checkpoint.verify import read_independently
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError, did_you_mean
from arriero.io.paths import as_path
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.quant.packed import Quantized
from arriero.quant.rounding import nearest
from arriero.show.progress import Bar
from arriero.show.progress import progress as progress_bar
from arriero.tokenizer.base import Tokenizer

Kind = Literal["int8", "int4", "nf4"]
Format = Literal["compressed-tensors", "gguf"]
DEFAULT = "default"  # the text that calibration takes where no file is given


@dataclass(frozen=True)
class Rounded:
    """One matrix after rounding: its kind, ||W' - W|| / ||W||, and, where a text was used, the same of the outputs."""

    name: str
    kind: str
    error: float
    output_error: float | None = None


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
    calibration: Calibration | None
    rounded: list[Rounded] = field(default_factory=list)
    sums: dict[str, int] = field(default_factory=dict)  # of the matrices multiplied out

    def packed(self, name: str) -> Quantized | None:
        if name not in self.kinds:
            return None
        weight, found = self.weights.read(name).float(), None
        if self.calibration is None:
            matrix = nearest(weight, self.kinds[name])
        else:
            matrix, found = self.calibration.packed(name)
        dense = matrix.dense()
        self.rounded.append(Rounded(name, self.kinds[name], float((dense - weight).norm() / weight.norm()), found))
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
    format: Format = "compressed-tensors",
    calibrate: str | Path | None = None,
    budget_mb: float | None = None,
    keep_head: bool = False,
    chat_template: str = "",
    force: bool = False,
) -> Quantization:
    """Write `model` (path, Hub id or built-in name) at `out` with its matrices in `type`.

    type: "int8" (a scale for each output), "int4" (for each 32 inputs) or "nf4" (for each 64; read by Arriero only).
    format: "compressed-tensors" makes a directory, "gguf" a file. calibrate: a file of texts for which the error of the
    outputs is made small, "default" for Python's reference manual; None rounds each weight to its nearest code.
    budget_mb: with int4, how many megabytes (10^6) of weights a token may read: what suffers most is held in int8 as
    far as that goes (sensitivity.py). keep_head: leave the head as it is. chat_template: as in `convert`.
    Raises `CheckpointError` when `out` exists (unless `force`), when the model is quantised already, and when a width
    cannot be cut into groups; `DataError` for a text that cannot be used. Nothing is left at `out` by a run that fails.
    """
    source, out = resolve(model), as_path(out)
    _check_request(out, type, format, calibrate)
    if budget_mb is not None and type != "int4":
        raise CheckpointError(f"a budget of {budget_mb:g} MB decides what int4 leaves wider; type is {type}: take int4")
    check_destination(source, out, force)
    tokenizer = tokenizer_to_write(source, chat_template=chat_template)
    stored = open_weights(source)
    check_head(stored, "logits")
    if tokenizer is not None:
        check_rows(source, stored.config.vocab_size, tokenizer)
    weights = stored if keep_head else untied(stored)
    kinds = matrices_in(weights, type, keep_head)
    dtype = torch.float16 if stored.dtype is torch.float16 else torch.bfloat16
    beside = read_beside(source, same_model=True)
    if tokenizer is not None and chat_template:
        beside = beside.for_training(tokenizer)
    rows = None if calibrate is None else _rows(source, tokenizer, calibrate)
    if budget_mb is not None:
        sample = _rows(source, tokenizer, DEFAULT) if rows is None else rows
        kinds = _within_budget(weights, kinds, sample, int(budget_mb * 1e6), format)
    with _bar(source, type, weights) as bar:
        calibration = None if rows is None else Calibration(weights, kinds, rows, bar.say)
        rounded = write_rounded(weights, out, kinds, format, dtype, tokenizer, beside, bar, calibration)
    untied_now = stored.config.tied_embeddings and not keep_head
    return Quantization(out, untied_now, rounded, *_sizes(stored, weights, kinds, format))


def write_rounded(
    weights: Weights,
    out: Path,
    kinds: Mapping[str, str],
    format: Format,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    beside: Beside,
    bar: Bar,
    calibration: Calibration | None = None,
) -> list[Rounded]:
    """Write weights with the matrices `kinds` rounded, to the nearest codes or as `calibration` says, and check them.

    kinds: as `matrices_in` gives them. dtype: of all other tensors. Returns the matrices in the order of the model.
    """
    work = _Work(weights, kinds, bar, calibration)
    write_in(
        format,
        replace(weights, packed=work.packed),
        out,
        dtype,
        kinds,
        tokenizer,
        beside,
        progress=work.shown,
        check=lambda written: _check(written, out, work.sums),
    )
    return work.rounded


def _rows(source: Path, tokenizer: Tokenizer | None, file: str | Path) -> Tensor:
    if tokenizer is None:
        raise CheckpointError(
            f"{source}: calibration runs a text through the model, and there is no tokenizer; put the model's "
            "tokenizer files beside its weights, or leave --calibrate out"
        )
    return calibration_rows(tokenizer, None if file == DEFAULT else file)


def _check_request(out: Path, kind: str, format: str, calibrate: str | Path | None) -> None:
    if kind not in get_args(Kind):
        known = get_args(Kind)
        raise CheckpointError(
            f"no type {kind!r} to quantise to; known are {', '.join(known)}{did_you_mean(kind, known)}"
        )
    if format not in get_args(Format):
        known = get_args(Format)
        raise CheckpointError(
            f"no format {format!r} to write; known are {', '.join(known)}{did_you_mean(format, known)}"
        )
    if kind == "nf4" and format == "gguf":
        raise CheckpointError("GGUF has no NF4; take --type int4, or --format compressed-tensors")
    if kind == "nf4" and calibrate is not None:
        raise CheckpointError("nf4 is rounded to the nearest level only; take --type int4, or leave --calibrate out")
    if format == "gguf" and (out.suffix != ".gguf" or out.is_dir()):
        raise CheckpointError(f"{out}: a GGUF file is written; give it a name that ends in .gguf")
    if format != "gguf" and (out.suffix == ".gguf" or out.is_file()):
        raise CheckpointError(f"{out}: compressed-tensors is a directory; give the name of one, or take --format gguf")


@contextmanager
def _bar(source: Path, kind: str, weights: Weights) -> Iterator[Bar]:
    with progress_bar(f"{source.name} -> {kind}", sum(prod(entry.shape) for entry in weights.entries.values())) as bar:
        yield bar


def write_in(
    format: str,
    weights: Weights,
    out: Path,
    dtype: torch.dtype,
    kinds: Mapping[str, str],
    tokenizer: Tokenizer | None,
    beside: Beside,
    *,
    progress: Callable[[str], None],
    check: Callable[[Path], None],
) -> None:
    """Write weights in either format: the matrices `kinds` as `weights.packed` gives them, the others in `dtype`."""
    if format == "gguf":
        number = Kinds.F16 if dtype is torch.float16 else Kinds.BF16
        write_gguf_file(weights, out, number, tokenizer, beside, kinds, progress, check)
    else:
        write_hf(
            weights, out, dtype=dtype, tokenizer=tokenizer, beside=beside, kinds=kinds, progress=progress, check=check
        )


def matrices_in(weights: Weights, kind: str, keep_head: bool = False) -> dict[str, str]:
    """The matrices that are rounded, each with its kind. Raises `CheckpointError` for those that cannot be."""
    names = [name for name in weights.entries if name.endswith(LINEAR_ENDS) and not (keep_head and name == HEAD)]
    for name in names:
        if not weights.source.is_file() and weights.packed(name) is not None:
            raise CheckpointError(
                f"{weights.source}: quantised already ({name}); quantise the model that it was made from, for each "
                "rounding adds its own error"
            )
        check_width(weights, name, kind)
    return dict.fromkeys(names, kind)


def _within_budget(
    weights: Weights, kinds: Mapping[str, str], rows: Tensor, budget: int, format: str
) -> dict[str, str]:
    """Kinds with the matrices that suffer most in int8, so that a token reads at most `budget` bytes."""
    least = _sizes(weights, weights, kinds, format)[1][1]
    if budget < least:
        raise CheckpointError(
            f"{weights.source}: in int4 a token reads {least / 1e6:,.1f} MB, and the budget is {budget / 1e6:,.1f} MB; "
            "give more, or leave the budget out"
        )

    def extra(name: str) -> int:
        shape = weights.entries[name].shape
        return _bytes(name, shape, "int8", format) - _bytes(name, shape, "int4", format)

    with progress_bar("what suffers most") as bar:
        return widened(costs(weights, kinds, rows, bar.say), kinds, budget - least, extra)


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
    stored: Weights, weights: Weights, kinds: Mapping[str, str], format: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of all tensors, and of those that a token reads; before (at 16 bits) and after."""
    before = {name: prod(entry.shape) * 2 for name, entry in stored.entries.items()}
    after = {name: _bytes(name, entry.shape, kinds.get(name), format) for name, entry in weights.entries.items()}
    row = weights.config.dim * 2

    def read(sizes: dict[str, int], tied: bool) -> int:
        return sum(sizes.values()) - (0 if tied else sizes[EMBEDDINGS] - row)

    totals = sum(before.values()), sum(after.values())
    return totals, (read(before, stored.config.tied_embeddings), read(after, weights.config.tied_embeddings))


def _bytes(name: str, shape: tuple[int, ...], kind: str | None, format: str) -> int:
    """Bytes of a tensor in a file."""
    if format == "gguf":
        if kind is None:
            return prod(shape) * (2 if len(shape) > 1 else 4)  # norms are fp32 there
        values, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
        return prod(shape) // values * size
    if kind is None:
        return prod(shape) * 2
    parts = stored_entries(name, shape, kind, torch.bfloat16).values()
    return sum(prod(entry.shape) * entry.dtype.itemsize for entry in parts)
