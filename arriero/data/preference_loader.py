"""Rows and batches of preferences: every answer to a prompt in one row, behind the prompt, which is computed once.

A row is packed from whole rows of the data set, so answers that are compared are never parted. The documents of one are
the prompt without its last token, and the answers, each of which continues it and begins with that last token, since
that predicts its first (model/layout.py). What follows the token that ends an answer is cut off: nothing reads it.

Extras of a token: `scored`, 1 where the target counts in a preference; `end`, 1 at the token that ends an answer.
Extras of a document, all 0 for prompts and padding: `group`, which numbers the prompts of a batch from 1; `answer`, the
number of an answer in the data set, from 1; `value`, `margin`, `safe` (1 unsafe, 2 safe, 0 unknown), `best`, true for
the best of several answers, and `reference`, log-probabilities that are known beforehand.

`compared` makes pairs of a batch's documents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arriero.data.batch import IGNORED, Batch, Row, collate, joined, next_token_targets, shifted
from arriero.data.pack import Epochs
from arriero.data.preferences import PreferenceDataset
from arriero.errors import DataError

Taken = Literal["all", "extremes"]


class PreferenceLoader:
    """Packed rows of `seq_len` tokens at most, each epoch in its own order, as `SftLoader` has them.

    taken: all answers of a row, or its best and its worst. format_ids: tokens that do not count in a preference (those
    of the chat format). margins: of each row of the data set, [n]. reference: of each answer of the data set, [S].
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        seq_len: int,
        seed: int,
        packing: bool = True,
        *,
        taken: Taken = "all",
        format_ids: Collection[int] = (),
        margins: NDArray[np.float32] | None = None,
        reference: NDArray[np.float32] | None = None,
    ) -> None:
        self.dataset, self.seq_len, self.taken = dataset, seq_len, taken
        self.format_ids = np.array(sorted(format_ids), dtype=np.int32)
        self.margins, self.reference = margins, reference
        self.epochs = Epochs(self._lengths(), seq_len, seed, packing)

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows in `epoch`; every epoch has as many."""
        return self.epochs.rows

    def row(self, index: int) -> Row:
        """Row `index` of the endless sequence of epochs: a pure function of (data, arguments, index)."""
        groups = [self.group(i) for i in self.epochs.examples(index)]
        return joined([_numbered(group, k) for k, group in enumerate(groups)])

    def collate(self, rows: Sequence[Row], pad_to: int | None = None) -> Batch:
        """Rows end to end, their groups numbered anew; pad_to: as in `batch.collate`."""
        numbered, first = [], 0
        for row in rows:
            numbered.append(_numbered(row, first))
            first += int(row.document_extras["group"].max())
        return collate(numbered, pad_to)

    def answers(self, i: int) -> list[int]:
        """The answers of row i of the data set that are taken."""
        of = self.dataset.of_row(i)
        if self.taken == "all" or len(of) <= 2:
            return list(of)
        values = self.dataset.values[of.start : of.stop]
        return [of[int(np.argmax(values))], of[int(np.argmin(values))]]

    def _lengths(self) -> NDArray[np.int64]:
        """Tokens of each row of the data set as it is taken."""
        lengths, data = self.dataset.lengths, self.dataset
        if self.taken == "extremes":
            lengths = lengths.copy()
            for i in np.flatnonzero(data.counts > 2).tolist():
                p = data.prompt(i)
                lengths[i] = p + sum(int(data.answers.lengths[answer]) - p for answer in self.answers(i))
        return lengths

    def group(self, i: int) -> Row:
        """Row i of the data set: the prompt and its answers."""
        data, taken, p = self.dataset, self.answers(i), self.dataset.prompt(i)
        if len(taken) == 1:
            p = 0  # one answer is one document with its prompt
        values = data.values[taken]
        margin = 0.0 if self.margins is None else self.margins[i]
        documents = [self._answer(answer, p) for answer in taken]
        if p:
            lead = data.answers.tokens(taken[0])[:p]
            zeros = np.zeros(p, dtype=np.float32)
            documents.insert(0, (lead, np.full(p, IGNORED, dtype=np.int64), zeros, zeros))
        tokens, targets, scored, end = (np.concatenate(parts) for parts in zip(*documents, strict=True))
        reference = np.zeros(len(taken)) if self.reference is None else self.reference[taken]
        of_answers = {
            "group": np.ones(len(taken), dtype=np.int64),
            "answer": np.array(taken, dtype=np.int64) + 1,
            "value": values,
            "margin": np.full(len(taken), margin, dtype=np.float32),
            "safe": data.safe[taken].astype(np.int64) + 1,
            "best": (np.arange(len(taken)) == int(np.argmax(values))) & (len(taken) > 1),
            "reference": reference.astype(np.float32),
        }
        pad = 1 if p else 0
        return Row(
            tokens=tokens,
            targets=targets,
            lengths=np.array([len(document[0]) for document in documents], dtype=np.int64),
            leads=(-1, *[0] * len(taken)) if p else (-1,),
            token_extras={"scored": scored, "end": end},
            document_extras={name: np.concatenate([np.zeros(pad, dtype=x.dtype), x]) for name, x in of_answers.items()},
        )

    def mismatched(self, index: int) -> Row:
        """The prompts of row `index`, each with the first answer to another one; it is numbered S + its row from 1.

        What is more probable there than it was says how far the model has moved in general (KTO, arXiv 2402.01306).
        """
        return joined([_numbered(self._mismatch(i), k) for k, i in enumerate(self.epochs.examples(index))])

    def _mismatch(self, i: int) -> Row:
        data, p = self.dataset, self.dataset.prompt(i)
        j = self._other(i)
        of, q = data.of_row(j)[0], data.prompt(j)
        tokens, targets, scored, end = self._answer(of, q)
        mine = data.answers.tokens(data.of_row(i)[0])[: p + 1]
        zeros = np.zeros(p, dtype=np.float32)
        n = min(p + len(tokens), self.seq_len)
        return Row(
            tokens=np.concatenate([mine, tokens[1:]])[:n],
            targets=np.concatenate([np.full(p, IGNORED, dtype=np.int64), targets])[:n],
            lengths=np.array([n], dtype=np.int64),
            leads=(-1,),
            token_extras={"scored": np.concatenate([zeros, scored])[:n], "end": np.concatenate([zeros, end])[:n]},
            document_extras={
                "group": np.ones(1, dtype=np.int64),
                "answer": np.array([len(data.values) + int(data.index[i]) + 1]),
            },
        )

    def _other(self, i: int) -> int:
        """The next row with another prompt."""
        hashes = self.dataset.hashes
        n = len(hashes)
        other = next((k % n for k in range(i + 1, i + n) if hashes[k % n] != hashes[i]), None)
        if other is None:
            raise DataError(f"{self.dataset.where(i)}: all rows have this prompt; kto needs answers to others")
        return other

    def _answer(self, answer: int, p: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """Tokens, targets, what counts, and where it ends, of an answer behind p tokens of its prompt."""
        tokens, trained = self.dataset.answers.tokens(answer), self.dataset.answers.trained(answer)
        stop = len(trained) - int(np.argmax(trained[::-1]))
        tokens, trained = tokens[p:stop], trained[p:stop]
        counts = trained & ~np.isin(tokens, self.format_ids)
        end = np.zeros(len(tokens), dtype=np.float32)
        end[-1] = 1
        return tokens, next_token_targets(tokens, trained), shifted(counts.astype(np.float32), 0.0), end


def _numbered(row: Row, first: int) -> Row:
    """The row with its groups numbered on from `first`."""
    group = row.document_extras["group"]
    return replace(row, document_extras={**row.document_extras, "group": group + first * (group > 0)})


@dataclass(frozen=True)
class Pairs:
    """Documents of a batch of which the first is better, m pairs: their indices and margins, [m] each."""

    better: Tensor
    worse: Tensor
    margins: Tensor


def compared(extras: Mapping[str, Tensor]) -> Pairs:
    """All pairs of answers to one prompt of which one is better."""
    group, value = extras["group"], extras["value"]
    better, worse = ((group[:, None] == group) & (group > 0) & (value[:, None] > value)).nonzero(as_tuple=True)
    return Pairs(better, worse, extras["margin"][better])


def n_pairs(batch: Batch) -> int:
    """How many pairs `compared` makes."""
    return len(compared(batch.document_extras).better)


def n_answers(batch: Batch) -> int:
    """How many answers a batch has."""
    return int((batch.document_extras["answer"] > 0).sum())


def n_best(batch: Batch) -> int:
    """How many groups of several answers a batch has."""
    return int(torch.as_tensor(batch.document_extras["best"]).sum())
