"""Log-probabilities of every answer that a run will read, by the model as it is before step 1: kept on disk.

The reference of a preference is the model that the run begins from: a base with a new adapter that does nothing yet, an
adapter that goes on, or every weight. So it is asked before step 1, as it is, and no second model is ever in memory.
What is known is kept in Arriero's cache (or the directory given), under a name made from the model's files, what is on
them, and the rows; it is not trusted before one of its rows has been computed again.

Price: a forward pass of each answer in the first run (a third of a step of training), and 4 bytes on disk.
S answers of a data set, and as many more as it has rows, for answers to other prompts (KTO).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from arriero.checkpoint.digest import content_digest
from arriero.data.batch import Batch, Row, collate, row_groups
from arriero.data.preference_loader import PreferenceLoader
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh
from arriero.io import paths
from arriero.io.files import replaced_file
from arriero.show.progress import progress
from arriero.show.terminal import warn_once
from arriero.train.preference_objective import scored_logprobs
from arriero.train.tuned import Base

TOLERANCE = 0.05  # nats a token between two computations of the same log-probability, in bf16 by other batches


class References:
    """What is known of a data set's answers, fp32 [size], nan where nothing is; `fill` computes what rows lack."""

    def __init__(self, file: Path, size: int, mesh: Mesh) -> None:
        """Process 0 reads `file`, which another may be writing, and tells the others: all of them know the same."""
        self.file = file
        values = _read(file, size) if mesh.rank == 0 else np.zeros(size, dtype=np.float32)
        self.values: NDArray[np.float32] = mesh.sum(torch.from_numpy(values).to(mesh.device)).cpu().numpy()

    def fill(self, engine: Engine, loader: PreferenceLoader, rows: Sequence[Row], console: Console) -> None:
        """Compute what is lacking of the answers of `rows`, and keep it. Every process has to call it."""
        self._check(engine, loader, rows)
        lacking = [row for row in rows if np.isnan(self.values[_answers(row)]).any()]
        if not lacking:
            return
        with progress("reference", len(lacking), console) as bar:
            for first in range(0, len(lacking), engine.mesh.dp_size):
                group = lacking[first : first + engine.mesh.dp_size]
                for answers, sums in self._computed(engine, loader, group):
                    self.values[answers] = sums
                bar.reach(first + len(group))
        if engine.mesh.rank == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(self.file) as temporary, open(temporary, "wb") as out:
                np.save(out, self.values, allow_pickle=False)

    def _check(self, engine: Engine, loader: PreferenceLoader, rows: Sequence[Row]) -> None:
        """Forget all where a row that is known comes out otherwise."""
        known = next((row for row in rows if not np.isnan(self.values[_answers(row)]).any()), None)
        if known is None:
            return
        for answers, sums in self._computed(engine, loader, [known]):
            if np.abs(self.values[answers] - sums).max() > TOLERANCE * len(known.tokens):
                warn_once(f"{self.file}: its log-probabilities are not those of this model; they are computed again")
                self.values[:] = np.nan

    def _computed(
        self, engine: Engine, loader: PreferenceLoader, rows: Sequence[Row]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """The answers of these rows, at most one a data-parallel group, and their log-probabilities."""
        mesh = engine.mesh
        mine = loader.collate([rows[min(mesh.dp_rank, len(rows) - 1)]]).to(mesh.device)
        sums = document_logprobs(engine, [mine])[0].double()
        found = []
        for i, row in enumerate(rows):
            of_row = sums if mesh.dp_rank == i and mesh.is_first("pp", "cp", "tp") else None
            whole = torch.zeros(len(row.lengths), dtype=torch.float64, device=mesh.device) if of_row is None else of_row
            total = mesh.sum(whole).cpu().numpy()
            mask = row.document_extras["answer"] > 0
            found.append((_answers(row), total[mask].astype(np.float32)))
        return found


def _read(file: Path, size: int) -> NDArray[np.float32]:
    """What a file holds, or nan everywhere where there is none, or it is damaged, and so made again."""
    nothing = np.full(size, np.nan, dtype=np.float32)
    try:
        known = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return nothing
    return known if known.shape == nothing.shape and known.dtype == nothing.dtype else nothing


def _answers(row: Row) -> NDArray[np.int64]:
    of = row.document_extras["answer"]
    return of[of > 0] - 1


def document_logprobs(engine: Engine, batches: Sequence[Batch]) -> list[Tensor]:
    """log p of what counts of each document, [n] for each batch, without dropout. Every process has to call it."""
    training = engine.model.training
    engine.train(False)
    try:
        values = engine.evaluate(batches, scored_logprobs)
    finally:
        engine.train(training)
    return [batch.documents.sums(value) for batch, value in zip(batches, values, strict=True)]


def with_reference(engine: Engine, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with the log-probabilities of the model without its adapter. Every process has to call it."""
    with engine.using_adapter(None):
        sums = document_logprobs(engine, batches)
    return [_extended(batch, reference=values) for batch, values in zip(batches, sums, strict=True)]


class ReferencePoint:
    """KTO's reference point: the mean of log pi - log pi_ref over answers to other prompts, at least 0.

    Of a step it is that of the whole global batch. It needs no journal: it follows from the step and the weights.
    """

    def __init__(self, loader: PreferenceLoader, engine: Engine) -> None:
        self.loader, self.engine = loader, engine
        self.value = 0.0  # before step 1 the model is its reference

    def put(self, batches: Sequence[Batch], first: int, n: int, micro_rows: int) -> list[Batch]:
        """Estimate it on rows `first` to `first + n - 1`, and give it to the batches made of them.

        Every process has to call it.
        """
        mesh, loader, known = self.engine.mesh, self.loader, self.loader.reference
        mine = row_groups(first, micro_rows, mesh.local_shard(n // micro_rows))
        others = [collate([loader.mismatched(i) for i in group]).to(mesh.device) for group in mine]
        policy = document_logprobs(self.engine, others)
        if known is None:
            reference = [batch.document_extras["reference"] for batch in with_reference(self.engine, others)]
        else:
            reference = [torch.from_numpy(known[(b.document_extras["answer"] - 1).cpu().numpy()]) for b in others]
        moved = [float((a.double().cpu() - b.double().cpu()).sum()) for a, b in zip(policy, reference, strict=True)]
        total, count = mesh.count(sum(moved), float(sum(len(values) for values in policy)))
        self.value = max(0.0, total / count)
        return [self.on(batch) for batch in batches]

    def on(self, batch: Batch) -> Batch:
        """The batch with it as it was last estimated."""
        answers = batch.document_extras["answer"]
        return _extended(batch, reference_point=torch.full(answers.shape, self.value, device=answers.device))


def _extended(batch: Batch, **extras: Tensor) -> Batch:
    return dataclasses.replace(batch, document_extras={**batch.document_extras, **extras})


def reference_file(base: Base, facts: Mapping[str, Any], directory: Path | None = None) -> Path:
    """The file for what a model, as a run begins from it, says of rows. facts: what else decides the numbers."""
    config = base.config
    identity = {
        "model": content_digest(base.weights.source),
        "held": [config.method, config.quantize, config.loop.precision],
        "adapter": _digest(base.adapter),
        "scale": repr(base.lora) if base.adapter else "",
        **facts,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]
    return (directory or paths.cache_dir() / "reference") / f"{name}.npy"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
