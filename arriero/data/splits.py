"""What is learned from and what is held out: the same for conversations and for preferences.

A share is held out by the hash of an example's content, so the same ones are held out on every run and when rows are
added, and equal contents are never on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from arriero.errors import DataError


class Examples(Protocol):
    """Examples that can be chosen from, n of them.

    lengths: tokens of each, [n]. hashes: 64 bits of each one's content, [n].
    """

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def hashes(self) -> NDArray[np.uint64]: ...

    def __len__(self) -> int: ...

    def where(self, i: int) -> str: ...

    def select(self, chosen: NDArray[Any]) -> Self: ...


E = TypeVar("E", bound=Examples)


def splits(build: Callable[[Any], E], train: Any, validation: str, console: Console) -> tuple[E, E | None]:
    """Training and validation examples; `validation` is a file, or a share of the training rows ("0": none).

    build: makes the examples of a source. From a file, examples whose content is also in it are left out of training.
    """
    share = parse_share(validation)
    dataset = build(train)
    if share is not None:
        return split_by_content(dataset, share)
    held_out = build(validation)
    seen = np.isin(dataset.hashes, held_out.hashes)
    if seen.all():
        raise DataError(f"{train}: every row is also in the validation data {validation}; nothing is left to train on")
    if seen.any():
        console.print(
            f"left {seen.sum():,} of {len(dataset):,} training rows out: they are also in {validation}", markup=False
        )
    return dataset.select(~seen), held_out


def parse_share(validation: str) -> float | None:
    """The share in [0, 1) that `validation` spells, or None where it names a file."""
    try:
        share = float(validation)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise DataError(f"validation is {validation}; give a file, or a share of the training rows from 0 to below 1")
    return share


def split_by_content(dataset: E, share: float) -> tuple[E, E | None]:
    """Hold out the examples whose content hash is below `share` of its range; at least the one with the smallest."""
    if share == 0:
        return dataset, None
    hashes = dataset.hashes
    held_out = hashes <= np.maximum(hashes.min(), np.uint64(share * 2**64))
    if held_out.all():
        raise DataError(
            f"a validation share of {share} of {len(dataset)} rows leaves none to train on; "
            "lower it, or give more distinct rows"
        )
    return dataset.select(~held_out), dataset.select(held_out)


def leave_out_long(dataset: E, max_length: int, max_truncated: float, console: Console) -> E:
    """The examples of at most `max_length` tokens; a cut answer would teach the model to stop anywhere."""
    long = dataset.lengths > max_length
    share = float(long.mean())
    if share > max_truncated:
        first, longest = int(np.argmax(long)), int(dataset.lengths.max())
        raise DataError(
            f"{dataset.where(first)}: {dataset.lengths[first]:,} tokens do not fit {max_length:,}, and neither do "
            f"{share:.1%} of the rows (at most {max_truncated:.1%} may be left out); raise seq_len "
            f"(the longest row has {longest:,} tokens), shorten the rows, or raise max_truncated"
        )
    if long.all():
        raise DataError(f"{dataset.where(0)}: no row fits {max_length:,} tokens; raise seq_len")
    if long.any():
        console.print(
            f"left {long.sum():,} of {len(dataset):,} rows out: longer than {max_length:,} tokens", markup=False
        )
    return dataset.select(~long)
