"""Rows and batches from a tokenised data set, in an order that is a pure function of (seed, index).

There is no loader state but a count: `row(index)` gives the same row to whoever asks, at any time, on any number of
processes. Resume is "go on from index". Every epoch packs and orders its rows anew, and has the same number of them.

A batch is one flat sequence of documents, N tokens in all, that attend to themselves only (`cu_seqlens`); targets
hold the id of the next token where that one is trained. No document predicts the next one's first token.

Instruction data tends to begin every example with the same system prompt. What all examples share stands once at the
head of a batch, as its first document, and the others continue it (model/attention.py): the same losses and
gradients for less work (a fifth to a third less on short examples).
Price: packing an epoch (about a second for a million examples) when its first row is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arriero.data.pack import Packing, one_each, pack
from arriero.data.sft import SftDataset
from arriero.errors import DataError

IGNORED = -100
"""The target of a position that is not trained."""

WORTH_SHARING = 8  # tokens: a shorter common beginning saves less than it costs to handle


@dataclass(frozen=True)
class Row:
    """The documents of one packed row, end to end, each without the shared prefix."""

    tokens: NDArray[np.int32]  # [n]
    targets: NDArray[np.int64]  # [n], next token's id or IGNORED
    lengths: NDArray[np.int64]  # [documents], summing to n


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end as one sequence of N tokens, ready for `Llama(tokens, cu_seqlens)`."""

    tokens: Tensor  # int64 [1, N]
    targets: Tensor  # int64 [1, N]
    cu_seqlens: Tensor  # int32 [documents + 1]
    n_trained: int  # targets that are not IGNORED
    prefix: int = 0  # length of the first document when the others continue it

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        tokens, targets, bounds = (x.to(device) for x in (self.tokens, self.targets, self.cu_seqlens))
        return dataclasses.replace(self, tokens=tokens, targets=targets, cu_seqlens=bounds)


def next_token_targets(tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> NDArray[np.int64]:
    """targets[t] = tokens[t + 1] if trained[t + 1] else IGNORED, for one document [n]; its last target is IGNORED."""
    targets = np.full(len(tokens), IGNORED, dtype=np.int64)
    targets[:-1] = np.where(trained[1:], tokens[1:], IGNORED)
    return targets


def shared_prefix(dataset: SftDataset) -> NDArray[np.int32]:
    """The tokens that every example begins with, [p]; none of them, nor the one after them, is trained.

    Empty where fewer than WORTH_SHARING are shared.
    """
    shared = dataset.tokens(0)
    for i in range(len(dataset)):
        untrained = int(np.argmax(dataset.trained(i)))
        shared = shared[: max(untrained - 1, 0)]
        differs = shared != dataset.tokens(i)[: len(shared)]
        if differs.any():
            shared = shared[: int(np.argmax(differs))]
        if len(shared) < WORTH_SHARING:
            return shared[:0]
    return shared


class SftLoader:
    """Packed rows of `seq_len` tokens at most (one example a row without packing), each epoch in its own order."""

    def __init__(self, dataset: SftDataset, seq_len: int, seed: int, packing: bool = True) -> None:
        if len(dataset) == 0:
            raise DataError("the data set has no examples; give it rows, or a smaller validation share")
        longest = int(dataset.lengths.max())
        if longest > seq_len:
            raise DataError(
                f"the longest example has {longest} tokens but rows hold {seq_len}; "
                f"build the data set with max_length={seq_len}, or raise seq_len"
            )
        self.dataset, self.seq_len, self.seed, self.packing = dataset, seq_len, seed, packing
        self.prefix = shared_prefix(dataset)
        self._packing = lru_cache(maxsize=2)(self._pack_epoch)  # two: a batch may span the end of an epoch
        self._rows = len(self._packing(0))

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows in `epoch`; every epoch has as many, since packing's row count depends on the lengths alone."""
        return self._rows

    def row(self, index: int) -> Row:
        """Row `index` of the endless sequence of epochs: a pure function of (data, seq_len, seed, index)."""
        assert index >= 0
        epoch, k = divmod(index, self._rows)
        examples = self._packing(epoch).row(k).tolist()
        p = len(self.prefix)
        tokens = [self.dataset.tokens(i)[p:] for i in examples]
        targets = [next_token_targets(t, self.dataset.trained(i)[p:]) for t, i in zip(tokens, examples, strict=True)]
        return Row(np.concatenate(tokens), np.concatenate(targets), np.array([len(t) for t in tokens], dtype=np.int64))

    def collate(self, rows: Sequence[Row], pad_to: int | None = None) -> Batch:
        """Lay rows end to end behind the shared prefix.

        pad_to: N; an untrained document fills up to it. Compiled code wants one shape, and so does the heap: with
        lengths as they come, a run's memory grew by a quarter in 60 steps (docs/log.md). None pads nothing.
        """
        p = len(self.prefix)
        head = [Row(self.prefix, np.full(p, IGNORED), np.array([p]))] if p else []
        return dataclasses.replace(collate([*head, *rows], pad_to), prefix=p)

    def _pack_epoch(self, epoch: int) -> Packing:
        if not self.packing:
            return one_each(len(self.dataset), self.seed, epoch)
        p = len(self.prefix)
        return pack(self.dataset.lengths - p, self.seq_len - p, self.seed, epoch)


def collate(rows: Sequence[Row], pad_to: int | None = None) -> Batch:
    """Lay rows end to end and pad; `SftLoader.collate` adds the shared prefix."""
    lengths = np.concatenate([row.lengths for row in rows])
    n_padding = 0 if pad_to is None else pad_to - int(lengths.sum())
    assert n_padding >= 0, f"{-n_padding} tokens more than pad_to={pad_to}"
    targets = np.concatenate([row.targets for row in rows])
    bounds = np.cumsum([0, *lengths, *([n_padding] if n_padding else [])])
    return Batch(
        tokens=torch.from_numpy(np.pad(np.concatenate([row.tokens for row in rows]), (0, n_padding))).long()[None],
        targets=torch.from_numpy(np.pad(targets, (0, n_padding), constant_values=IGNORED))[None],
        cu_seqlens=torch.from_numpy(bounds).int(),
        n_trained=int((targets != IGNORED).sum()),
    )


def rows_of_rank(first: int, n: int, rank: int, world: int) -> range:
    """Which of the rows first to first + n of a global batch a process takes: neighbours, all but equally many each.

    Put together in the order of the ranks they are the global batch, for any world size.
    """
    assert 0 <= rank < world
    return range(first + n * rank // world, first + n * (rank + 1) // world)
