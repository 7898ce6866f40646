"""Validation rows: the first rows of a held-out set, and the number of text bytes that their targets stand for.

Bits per byte = cross-entropy of the target tokens in bits / UTF-8 bytes of those same tokens. A document's first token
is a target only where a begin-of-text token precedes it; otherwise its bytes do not count. The end-of-text token is a
target and has no bytes. `Tokenizer.text_bytes` says how many bytes each token stands for; a whole document's are known.

Price: the documents that the rows touch are read once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from arriero.data.batch import Row
from arriero.data.order import BestFit, Pieces, Windows
from arriero.data.shards import Shards
from arriero.errors import DataError
from arriero.show.terminal import warn_once
from arriero.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class HeldOutRows:
    """The first `n_rows` rows of one set; `n_tokens` predicted tokens stand for `n_bytes` bytes of text."""

    run: BestFit
    n_rows: int
    n_tokens: int
    n_bytes: float

    def row(self, index: int) -> Row:
        """Row `index`, the same in every run."""
        return self.run.row(index)


def held_out_rows(
    held_out: Mapping[str, Shards], tokenizer: Tokenizer, seq_len: int, n_tokens: int
) -> dict[str, HeldOutRows]:
    """About `n_tokens` of the held-out sets in rows of `seq_len`, of each set in proportion to its size.

    A set of which no token is predicted is left out, with a warning; raises `DataError` where that leaves none.
    """
    total = sum(shards.n_tokens for shards in held_out.values())
    found = {}
    for name, shards in held_out.items():
        share = math.ceil(n_tokens * shards.n_tokens / total)
        rows = first_rows(shards, name, tokenizer, seq_len, share)
        if rows.n_tokens:
            found[name] = rows
        else:
            warn_once(f"{shards.directory}: its documents are of one token each, which nothing predicts: not measured")
    if held_out and not found:
        raise DataError(
            f"{next(iter(held_out.values())).directory}: every held-out document is one token, which nothing predicts; "
            "hold out others (arriero shard --validation), or validate on another set (--validation DIR)"
        )
    return found


def first_rows(shards: Shards, name: str, tokenizer: Tokenizer, seq_len: int, n_tokens: int) -> HeldOutRows:
    """The rows of `seq_len` tokens that predict at least `n_tokens`, or all; none where nothing is predicted."""
    run = BestFit(Windows(shards, name, seed=0), seq_len)
    rows: list[Pieces] = []
    count = 0
    while count < n_tokens and len(rows) < run.rows_in_epoch:
        rows.append(run.pieces(len(rows)))
        count += int((rows[-1].stop - rows[-1].start).sum())
    n_bytes = _bytes(shards, tokenizer, Pieces.concatenated(rows).joined()) if rows else 0.0
    return HeldOutRows(run, len(rows), count, n_bytes)


def _bytes(shards: Shards, tokenizer: Tokenizer, pieces: Pieces) -> float:
    """Bytes of the tokens that `pieces`, sorted by document, predict: of each, those after its inputs."""
    total = 0.0
    at = np.flatnonzero(np.diff(pieces.document, prepend=-1))
    for first, last in zip(at, [*at[1:], len(pieces.document)], strict=True):
        document = int(pieces.document[first])
        sizes = tokenizer.text_bytes(shards.tokens(document), int(shards.text_bytes[document]))
        before = np.append(0, np.cumsum(sizes))
        total += float((before[pieces.stop[first:last] + 1] - before[pieces.start[first:last] + 1]).sum())
    return total
