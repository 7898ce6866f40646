"""Weights rounded on the fly (`--quantize int8|int4`), kept in a cache, so that only the first start has to round.

The matrices that are not quantised yet, a head that is the embeddings among them, become the nearest codes. They lie
in `quantized/` in Arriero's cache, in a file named by the SHA-256 of what decides them: the bytes of the checkpoint's
files, the type, and the format of an adapter's base. So a changed checkpoint is another file, wherever it lies, and
two copies of one share theirs. The files hold at most `MOST` bytes together; those used longest ago go first, and all
may be deleted at any time. Where nothing can be written, the matrices are rounded at each start.

Price: a start reads the checkpoint once, for the name (docs/log.md, "Quantisation").
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.digest import content_digest
from arriero.checkpoint.hf import LINEAR_ENDS
from arriero.checkpoint.tensor_file import DTYPES, Entry, safetensors_entries, tensor_reader, write_safetensors
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError, UserError
from arriero.io.files import replaced_file
from arriero.io.paths import cache_dir
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.quant.packed import BITS, Quantized
from arriero.quant.rounding import GROUP, nearest
from arriero.show.terminal import warn_once

MOST = 20 * 10**9
"""Bytes of all files together."""
_RULES = 1  # how weights become codes: another number where that changes


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


def check_width(weights: Weights, name: str, kind: str) -> None:
    """Refuse a matrix that `kind` cannot cut into groups."""
    n_in = weights.entries[name].shape[1]
    if kind in GROUP and n_in % GROUP[kind]:
        raise CheckpointError(
            f"{weights.source}: {name} has {n_in} inputs, and {kind} shares a scale among {GROUP[kind]} of a row; "
            "take int8 (--type int8, --quantize int8), which has one for each row"
        )


def rounded_in(weights: Weights, kind: str, held: str | None = None) -> Weights:
    """`weights` with codes of `kind` (`Weights.packed`) for each matrix that is not stored quantised.

    held: the format that `held_in` rounded them to, if any. Raises `CheckpointError` for a width that `kind` cannot cut
    into groups.
    """
    weights = untied(weights)
    matrices = [name for name in weights.entries if name.endswith(LINEAR_ENDS)]
    names = [name for name in matrices if weights.packed(name) is None]
    if len(names) < len(matrices):
        warn_once(
            f"{weights.source}: {len(matrices) - len(names)} of {len(matrices)} matrices are stored quantised already "
            f"and stay as they are; {kind} is for the others"
        )
    for name in names:
        check_width(weights, name, kind)
    file = cache_dir() / "quantized" / f"{_digest(weights.source, kind, held)}.safetensors"
    cached = _cached(weights, names, kind, file)

    @torch.no_grad()
    def packed(name: str) -> Quantized | None:
        if name not in names:
            return weights.packed(name)
        return nearest(weights.read(name), kind) if cached is None else cached(name)

    return replace(weights, packed=packed)


def _digest(source: Path, kind: str, held: str | None) -> str:
    """Of what decides the codes: 24 characters."""
    return hashlib.sha256(f"{_RULES} {kind} {held} {content_digest(source)}".encode()).hexdigest()[:24]


def _cached(weights: Weights, names: list[str], kind: str, file: Path) -> Callable[[str], Quantized] | None:
    """What reads the codes from the cache, which has them by then; None where it cannot be used."""
    entries = _entries(weights, names, kind)
    try:
        if not _is_whole(file, entries):
            _write(weights, kind, file, entries)
        file.touch()  # used last
    except OSError as error:
        warn_once(
            f"{file.parent}: the quantised weights cannot be kept there ({error.strerror or error}), so they are "
            "rounded at each start; free space, or name another directory by ARRIERO_CACHE"
        )
        return None
    read = tensor_reader(file)
    return lambda name: Quantized(kind, read(f"{name}.codes"), read(f"{name}.scales"))


def _entries(weights: Weights, names: list[str], kind: str) -> dict[str, Entry]:
    """Of the file: codes and scales of each matrix, as `Quantized` has them."""
    entries = {}
    for name in names:
        n_out, n_in = weights.entries[name].shape
        codes = torch.int8 if BITS[kind] == 8 else torch.uint8
        entries[f"{name}.codes"] = Entry((n_out, n_in * BITS[kind] // 8), codes)
        entries[f"{name}.scales"] = Entry((n_out, n_in // GROUP.get(kind, n_in)), torch.float32)
    return entries


def _is_whole(file: Path, entries: dict[str, Entry]) -> bool:
    """Whether the file is there and holds what it should; a damaged one is made anew."""
    if not file.is_file():
        return False
    try:
        return safetensors_entries(file, tuple(DTYPES)) == entries
    except UserError:
        return False


def _write(weights: Weights, kind: str, file: Path, entries: dict[str, Entry]) -> None:
    made: dict[str, Quantized] = {}  # the last one

    @torch.no_grad()
    def part(entry: str) -> Tensor:
        name, _, which = entry.rpartition(".")
        if name not in made:
            made.clear()
            made[name] = nearest(weights.read(name), kind)
        return made[name].codes if which == "codes" else made[name].scales

    _make_room(file.parent, sum(e.dtype.itemsize * e.shape[0] * e.shape[1] for e in entries.values()))
    with replaced_file(file) as temporary:
        write_safetensors(temporary, entries, part)


def _make_room(directory: Path, needed: int) -> None:
    """Delete what was used longest ago, until there is room for so many bytes more."""
    used = []
    for file in directory.glob("*.safetensors"):
        with suppress(OSError):  # another process may have deleted it
            used.append((file.stat().st_mtime, file.stat().st_size, file))
    used.sort(key=lambda each: each[0])
    while used and sum(size for _, size, _ in used) + needed > MOST:
        with suppress(OSError):
            os.unlink(used.pop(0)[2])
