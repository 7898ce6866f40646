"""From the rows of a data set to what a process learns from in a step: the same for every recipe that reads rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from arriero.data.batch import Batch, Row, row_groups
from arriero.distributed.mesh import Mesh


class Rows(Protocol):
    """A data set as rows by number (data/sft_loader.py, data/pretrain_loader.py)."""

    def row(self, index: int) -> Row:
        """Row `index`, a pure function of it."""

    def collate(self, rows: Sequence[Row], pad_to: int | None = None) -> Batch:
        """Rows as one batch; pad_to: as in `batch.collate`."""


def micro_batches(
    rows: Rows, first: int, n: int, micro_rows: int, mesh: Mesh, pad_to: int | None = None
) -> list[Batch]:
    """This process's micro-batches, of `micro_rows` rows each, of the global batch of rows `first` to `first + n - 1`.

    pad_to: tokens of a micro-batch; None leaves them as many as they are.
    """
    mine = row_groups(first, micro_rows, mesh.local_shard(n // micro_rows))
    return [rows.collate([rows.row(i) for i in group], pad_to).to(mesh.device) for group in mine]
