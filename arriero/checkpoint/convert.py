"""Converts any checkpoint format to any other, tensor by tensor, with a progress bar.

Readers return `Weights` and writers take them; this module chooses the two and prepares the destination.
Converting to hf or gguf holds one tensor in memory; to meta, whose file is a pickle, the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch

from arriero.checkpoint.beside import Beside, read_beside, warn_of_losses, warn_of_tokenizer_ids
from arriero.checkpoint.gguf import Kind, write_gguf
from arriero.checkpoint.gguf_blocks import KINDS, fits
from arriero.checkpoint.hf import write_hf
from arriero.checkpoint.load import check_head, has_tokenizer, load_tokenizer_at, open_weights
from arriero.checkpoint.meta import write_meta
from arriero.checkpoint.rows import check_rows, with_unused_tokens
from arriero.checkpoint.source import resolve
from arriero.checkpoint.verify import check_written
from arriero.checkpoint.weights import Weights
from arriero.errors import CheckpointError, did_you_mean
from arriero.io.paths import as_path
from arriero.show.progress import progress
from arriero.show.terminal import warn_once
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.load import TOKENIZER_FILES

Format = Literal["hf", "meta", "gguf"]
NumberType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_KINDS: dict[torch.dtype | str, Kind] = {
    torch.float32: Kind.F32,
    torch.float16: Kind.F16,
    torch.bfloat16: Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q5_1": Kind.Q5_1,
    "q5_0": Kind.Q5_0,
    "q4_1": Kind.Q4_1,
    "q4_0": Kind.Q4_0,
}


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Format,
    dtype: NumberType | None = None,
    chat_template: str = "",
    force: bool = False,
) -> Path:
    """Write the model `src` (path, Hub id or built-in name) at `dst` in another format; returns `dst`.

    to: "hf" and "meta" make a directory, "gguf" a file ending in .gguf. dtype: None keeps the stored type (quantised
    weights become f32); q8_0, q4_0 and the like are for gguf only, and keep the codes of a matrix stored so. The
    tokenizer and chat templates come along where `src` has them;
    chat_template: another one, by name or file (as in `load_tokenizer_at`).
    Raises `CheckpointError` when `dst` exists (unless `force`), or cannot hold what `src` holds. Nothing is left at
    `dst` by a conversion that fails.
    """
    source, dst = resolve(src), as_path(dst)
    _check_request(dst, to, dtype)
    check_destination(source, dst, force)
    tokenizer = tokenizer_to_write(source, chat_template=chat_template)
    weights = open_weights(source)
    if to != "hf":
        check_head(weights, "logits")
    if tokenizer is not None:
        check_rows(source, weights.config.vocab_size, tokenizer)
    beside = read_beside(source, same_model=True)
    if tokenizer is not None and chat_template:
        beside = beside.for_training(tokenizer)  # answers end as this template ends them
    warn_of_tokenizer_ids(source, beside, tokenizer)
    warn_of_losses(source, beside, to)
    if tokenizer is None:
        warn_once(f"{source}: no tokenizer is there ({', '.join(TOKENIZER_FILES)}), so {dst} has none{_without(to)}")

    def check(written: Path) -> None:
        check_written(source, written, number, called=dst)

    number = _number_of(weights, dtype, to)
    with tensor_bar(f"{source.name} -> {to}", len(weights.entries)) as written:
        _write(weights, dst, to, number, tokenizer, beside, written, check)
    return dst


def _number_of(weights: Weights, dtype: NumberType | None, to: Format) -> torch.dtype | str:
    """The type to write: as asked for, else the stored one, where the format has it."""
    if dtype is not None:
        return _DTYPES.get(dtype, dtype)
    return weights.dtype if to != "gguf" or weights.dtype in _KINDS else torch.float32


def _without(to: str) -> str:
    return ", and llama.cpp does not load a file without one" if to == "gguf" else ""


def tokenizer_to_write(source: Path, *, adapter: str | Path | None = None, chat_template: str = "") -> Tokenizer | None:
    """The checkpoint's tokenizer with the chat template to write, or None where it has none."""
    if has_tokenizer(source) or (adapter is not None and has_tokenizer(resolve(adapter))):
        return load_tokenizer_at(source, adapter=adapter, chat_template=chat_template)
    if chat_template:
        raise CheckpointError(
            f"{source}: a chat template is given ({chat_template}), and there is no tokenizer to write it with; put "
            "the model's tokenizer files beside its weights"
        )
    return None


def _exact(weights: Weights, kind: Kind) -> dict[str, str]:
    """The matrices that are stored in codes which the type `kind` holds as they are."""
    if kind not in KINDS.values():
        return {}
    matrices = ((name, weights.packed(name)) for name in weights.entries)
    return {
        name: matrix.kind
        for name, matrix in matrices
        if matrix is not None and KINDS.get(matrix.kind) is kind and fits(matrix)
    }


@contextmanager
def tensor_bar(title: str, n_tensors: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; yields what to call with the name of each tensor."""
    with progress(f"{title}, {n_tensors:,} tensors", n_tensors) as bar:
        yield lambda name: bar.advance()


def check_destination(source: Path, dst: Path, force: bool) -> None:
    """Refuse to write over the source, or over anything at all without `force`."""
    if dst.exists() and dst.samefile(source):
        raise CheckpointError(f"{dst}: source and destination are the same; choose another destination")
    occupied = dst.is_file() or (dst.is_dir() and any(dst.iterdir()))
    if occupied and not force:
        raise CheckpointError(f"{dst}: exists already; choose another name, or give --force to overwrite it")


def _check_request(dst: Path, to: str, dtype: str | None) -> None:
    if to not in get_args(Format):
        raise CheckpointError(
            f"no format {to!r}; known are {', '.join(get_args(Format))}{did_you_mean(to, get_args(Format))}"
        )
    if dtype is not None and dtype not in get_args(NumberType):
        known = get_args(NumberType)
        raise CheckpointError(f"no number type {dtype!r}; known are {', '.join(known)}{did_you_mean(dtype, known)}")
    if dtype is not None and dtype.startswith("q") and to != "gguf":
        raise CheckpointError(f"{dtype} is a type of GGUF files; {to} holds f32, f16 or bf16")
    if to == "gguf" and (dst.suffix != ".gguf" or dst.is_dir()):
        raise CheckpointError(f"{dst}: a GGUF file is written; give it a name that ends in .gguf")
    if to != "gguf" and (dst.suffix == ".gguf" or dst.is_file()):
        raise CheckpointError(f"{dst}: --to {to} writes a directory; give it the name of one")


def _write(
    weights: Weights,
    dst: Path,
    to: str,
    number: torch.dtype | str,
    tokenizer: Tokenizer | None,
    beside: Beside,
    progress: Callable[[str], None],
    check: Callable[[Path], None],
) -> None:
    if to == "gguf":
        kind = _KINDS[number]
        write_gguf_file(weights, dst, kind, tokenizer, beside, _exact(weights, kind), progress, check)
        return
    assert isinstance(number, torch.dtype)
    write = write_hf if to == "hf" else write_meta
    write(weights, dst, dtype=number, tokenizer=tokenizer, beside=beside, progress=progress, check=check)


def write_gguf_file(
    weights: Weights,
    dst: Path,
    kind: Kind,
    tokenizer: Tokenizer | None,
    beside: Beside,
    kinds: Mapping[str, str],
    progress: Callable[[str], None],
    check: Callable[[Path], None],
) -> None:
    """Write a GGUF file with its tokenizer; kind, kinds, progress and check as in `write_gguf`."""
    from arriero.tokenizer.gguf import tokenizer_to_gguf
    from arriero.tokenizer.gguf_limits import differences

    if tokenizer is not None and (told := differences(tokenizer)):
        warn_once(f"{weights.source}: in llama.cpp some texts will have other ids: {'; '.join(told)}")
    rows = weights.config.vocab_size
    entries = {} if tokenizer is None else with_unused_tokens(tokenizer_to_gguf(tokenizer), rows)
    write_gguf(
        weights,
        dst,
        kind=kind,
        tokenizer=entries,
        name=dst.stem,
        beside=beside,
        kinds=kinds,
        progress=progress,
        check=check,
    )
