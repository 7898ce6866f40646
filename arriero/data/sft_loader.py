"""Rows and batches from a tokenised data set, in an order that is a pure function of (seed, index).

`row(index)` returns the same row at any time and on any number of processes, so the only state of a loader is the index
of the next row. Every epoch packs and shuffles its rows anew, and has the same number of them.

A batch is one flat sequence of documents (data/batch.py); targets hold the id of the next token where that one is
trained. No document predicts the next one's first token.

Instruction data tends to begin every example with the same system prompt. The tokens that all examples share are in a
batch once, as its first document, which the others continue (model/layout.py): the same losses and gradients for a
fifth to a third less work on short examples.
Price: packing an epoch (about a second for a million examples) when its first row is requested.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arriero.data.batch import IGNORED, Batch, Row, collate, next_token_targets
from arriero.data.pack import Epochs
from arriero.data.sft import SftDataset

WORTH_SHARING = 8  # tokens: a shorter common beginning saves less than it costs to handle


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
        self.dataset, self.seq_len = dataset, seq_len
        self.epochs = Epochs(dataset.lengths, seq_len, seed, packing)
        self.prefix = shared_prefix(dataset)
        if p := len(self.prefix):
            self.epochs = Epochs(dataset.lengths - p, seq_len - p, seed, packing)

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows in `epoch`; every epoch has as many."""
        return self.epochs.rows

    def row(self, index: int) -> Row:
        """Row `index` of the endless sequence of epochs: a pure function of (data, seq_len, seed, index)."""
        examples = self.epochs.examples(index)
        p = len(self.prefix)
        tokens = [self.dataset.tokens(i)[p:] for i in examples]
        targets = [next_token_targets(t, self.dataset.trained(i)[p:]) for t, i in zip(tokens, examples, strict=True)]
        return Row(np.concatenate(tokens), np.concatenate(targets), np.array([len(t) for t in tokens], dtype=np.int64))

    def collate(self, rows: Sequence[Row], pad_to: int | None = None) -> Batch:
        """Rows end to end behind the shared prefix; pad_to: as in `batch.collate`."""
        p = len(self.prefix)
        lead = Row(self.prefix, np.full(p, IGNORED), np.array([p])) if p else None
        return collate(rows, pad_to, behind=lead)
