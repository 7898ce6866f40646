"""Rows of packed documents, and the batches made of them: tokens, targets and attention layout.

A row is documents end to end, with optional *extras*: further values per token (advantages, old log-probabilities,
weights) or per document (rewards, pair and group ids). Extras are joined, padded, cut and moved as the tokens are, by
the functions of this module only. A document may continue an earlier one of its row (model/layout.py).
Documents that belong together (a preference pair, a group of answers) are packed as one row. Rows are never split, and
a micro-batch is a whole number of rows, so such documents always stay together.

Shapes: N tokens, n documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arriero.model.layout import Documents, Layout

IGNORED = -100
"""The target of a position that is not trained."""

Extras = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """Documents end to end.

    tokens: [N]. targets: [N], the next token's id or IGNORED. lengths: [n], summing to N. leads: the index of the
    document that each continues, or -1; () for none. token_extras: by name, [N, ...], each position's as `shifted` has
    it. document_extras: by name, [n, ...].
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    leads: tuple[int, ...] = ()
    token_extras: Extras = field(default_factory=dict)
    document_extras: Extras = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The input of a forward: one row of N tokens with its attention `layout`.

    tokens, targets: int64 [1, N]; the extras by name [1, N, ...] and [n, ...]. n_trained: targets that are not IGNORED,
    of the whole row where this is a part of it.
    """

    tokens: Tensor
    targets: Tensor
    layout: Layout
    n_trained: int
    token_extras: Mapping[str, Tensor] = field(default_factory=dict)
    document_extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """N."""
        return self.tokens.shape[1]

    @property
    def documents(self) -> Documents:
        """The layout of a batch that is whole."""
        assert isinstance(self.layout, Documents)
        return self.layout

    def document_sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """values [1, N] summed over each document, [n], and 1 for each that this process adds to a loss, else 0.

        Where a batch is the part of a row that a context-parallel process holds, the sums are of whole documents all
        the same, and one of the processes adds them.
        """
        layout: Any = self.layout
        return layout.sums(values), layout.counted

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return dataclasses.replace(
            self._with(lambda x: x.to(device), lambda x: x.to(device)), layout=self.documents.to(device)
        )

    def padded(self, length: int) -> Batch:
        """With an untrained document at the end that fills up to `length` tokens; its extras are 0."""
        missing = length - self.n_tokens
        assert missing >= 0, f"{-missing} tokens more than {length}"
        if not missing:
            return self
        longer = self._with(lambda x: _more(x, missing, 1), lambda x: _more(x, 1, 0))
        longer.targets[:, -missing:] = IGNORED
        return dataclasses.replace(longer, layout=self.documents.padded(missing))

    def part(self, held: Tensor, layout: Layout) -> Batch:
        """The tokens at the indices `held`, with their attention `layout`. Extras of documents are kept whole."""
        return dataclasses.replace(self._with(lambda x: x[:, held], lambda x: x), layout=layout)

    def untrained(self) -> Batch:
        """The same tokens with nothing to learn: to keep step with processes that have a batch more."""
        return dataclasses.replace(self, targets=torch.full_like(self.targets, IGNORED), n_trained=0)

    def _with(self, of_tokens: Callable[[Tensor], Tensor], of_documents: Callable[[Tensor], Tensor]) -> Batch:
        """All tensors as these functions make them."""
        return dataclasses.replace(
            self,
            tokens=of_tokens(self.tokens),
            targets=of_tokens(self.targets),
            token_extras={name: of_tokens(x) for name, x in self.token_extras.items()},
            document_extras={name: of_documents(x) for name, x in self.document_extras.items()},
        )


def _more(x: Tensor, n: int, dim: int) -> Tensor:
    """x with n more entries of 0 along `dim`."""
    shape = list(x.shape)
    shape[dim] = n
    return torch.cat((x, x.new_zeros(shape)), dim)


def shifted(values: NDArray[Any], fill: Any) -> NDArray[Any]:
    """What is known of each token of a document [N, ...], at the position that predicts it; `fill` at the last one."""
    out = np.full_like(values, fill)
    out[:-1] = values[1:]
    return out


def next_token_targets(tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> NDArray[np.int64]:
    """targets[t] = tokens[t + 1] if trained[t + 1] else IGNORED, for one document [N]; its last target is IGNORED."""
    return shifted(np.where(trained, tokens, IGNORED).astype(np.int64), IGNORED)


def joined(rows: Sequence[Row], behind: Row | None = None) -> Row:
    """Rows end to end. behind: one document that all documents without a lead continue, laid before them.

    All rows have the extras of the first; those of `behind` are 0.
    """
    common, leads = (-1, list[int]()) if behind is None else (0, [-1])
    for row in rows:
        first = len(leads)
        leads += [common if lead < 0 else first + lead for lead in row.leads or (-1,) * len(row.lengths)]
    whole = list(rows) if behind is None else [_bare(behind, rows[0]), *rows]
    return Row(
        tokens=np.concatenate([row.tokens for row in whole]),
        targets=np.concatenate([row.targets for row in whole]),
        lengths=np.concatenate([row.lengths for row in whole]),
        leads=tuple(leads),
        token_extras={name: np.concatenate([row.token_extras[name] for row in whole]) for name in rows[0].token_extras},
        document_extras={
            name: np.concatenate([row.document_extras[name] for row in whole]) for name in rows[0].document_extras
        },
    )


def _bare(lead: Row, like: Row) -> Row:
    """`lead` with the extras of `like`, all 0."""

    def zeros(n: int, extras: Extras) -> Extras:
        return {name: np.zeros((n, *x.shape[1:]), x.dtype) for name, x in extras.items()}

    return dataclasses.replace(
        lead,
        token_extras=zeros(len(lead.tokens), like.token_extras),
        document_extras=zeros(len(lead.lengths), like.document_extras),
    )


def collate(rows: Sequence[Row], pad_to: int | None = None, behind: Row | None = None) -> Batch:
    """Rows end to end as one batch. pad_to: N; an untrained document fills up to it. behind: as in `joined`.

    Compiled code wants one shape, and so does the heap: with lengths as they come, a run's memory grew by a quarter in
    60 steps (docs/log.md). pad_to None pads nothing.
    """
    row = joined(rows, behind)
    batch = Batch(
        tokens=torch.from_numpy(row.tokens).long()[None],
        targets=torch.from_numpy(row.targets)[None],
        layout=Documents.of(row.lengths.tolist(), row.leads),
        n_trained=int((row.targets != IGNORED).sum()),
        token_extras={name: torch.from_numpy(x)[None] for name, x in row.token_extras.items()},
        document_extras={name: torch.from_numpy(x) for name, x in row.document_extras.items()},
    )
    return batch if pad_to is None else batch.padded(pad_to)


def row_groups(first: int, micro_rows: int, mine: range) -> list[range]:
    """Rows of the micro-batches numbered `mine` of a global batch that begins at row `first`, `micro_rows` in each."""
    return [range(first + i * micro_rows, first + (i + 1) * micro_rows) for i in mine]
