"""Supervised fine-tuning: the recipe behind `arriero sft`.

Loss on the assistant's tokens only (arXiv 2307.09288, section 3.1), packed rows, document masks. Ends with `adapter/`
in PEFT's layout or `model/` in Hugging Face's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from arriero.data.batch import Batch
from arriero.data.sft import SftDataset, build_splits, data_stats
from arriero.data.sft_loader import SftLoader
from arriero.distributed.mesh import Mesh
from arriero.distributed.objective import Objective
from arriero.tokenizer.base import Tokenizer
from arriero.train.batches import Rows, micro_batches
from arriero.train.config import SftConfig
from arriero.train.loop import Outcome, Trainer
from arriero.train.objectives import next_token
from arriero.train.recipe import alone, execute
from arriero.train.rows_run import RowsRun
from arriero.train.samples import answer, write_samples
from arriero.train.tuned import open_base
from arriero.train.validation import HeldOut, Validation


def main(config: SftConfig) -> Outcome:
    """Fine-tune as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    return execute(config, "sft", build)


@dataclass(frozen=True)
class SftRun(RowsRun):
    """Everything a run is made of, ready for step 1."""

    config: SftConfig
    training: SftDataset
    validation: SftDataset | None
    loader: SftLoader

    def counted(self) -> str:
        """How much there is to learn from, for the summary."""
        rows, tokens = self.loader.rows_in_epoch(0), self.config.data.seq_len
        return f"{len(self.training):,} examples, {rows:,} rows of {tokens:,} tokens; {self.n_held_out:,} held out"

    def statistics(self) -> dict[str, Any]:
        """Counts and lengths of the examples."""
        return {**data_stats(self.training, self.loader.seq_len).to_dict(), "validation_examples": self.n_held_out}

    def sample(self, when: Literal["before", "after"]) -> None:
        """Answer a few held-out prompts."""
        if (model := self.tuned.engine.whole_model()) is None:
            return
        answers = answer(model, self.tuned.base.tokenizer, self.validation, self.config.samples)
        write_samples(Path(self.config.out), answers, when)


def as_they_are(loader: SftLoader, _: Tokenizer) -> Rows:
    """The rows of a loader."""
    return loader


def build(
    config: SftConfig,
    console: Console,
    mesh: Mesh | None = None,
    *,
    rows_of: Callable[[SftLoader, Tokenizer], Rows] = as_they_are,
    objective: Objective | None = None,
) -> SftRun:
    """Load, tokenise, adapt, split over `mesh` (None: one process): everything up to step 1.

    rows_of: adds to the rows what an `objective` other than `next_token` needs beside them.
    """
    loop, data, mesh = config.loop, config.data, mesh or alone()
    mesh.config.check_batch(loop.batch_rows, loop.micro_rows, data.seq_len)
    base = open_base(config, longest=data.seq_len)
    with mesh.one_before_others():  # who come later find the tokens in the cache
        training, validation = build_splits(
            data.train,
            data.validation,
            base.tokenizer,
            max_length=data.seq_len,
            max_truncated=data.max_truncated,
            workers=data.workers,
            console=console,
        )
    loader = SftLoader(training, data.seq_len, loop.seed, data.packing)
    steps = loop.steps or max(1, math.ceil(loop.epochs * loader.rows_in_epoch(0) / loop.batch_rows))
    tuned = base.on(mesh, tokens=steps * loop.batch_rows * data.seq_len)
    pad_to, row = (tuned.padded_to(n * data.seq_len, data.packing) for n in (loop.micro_rows, 1))

    objective = objective or next_token()
    validate = None
    with mesh.one_before_others():
        rows = rows_of(loader, base.tokenizer)
        if validation is not None:
            one_each = SftLoader(validation, data.seq_len, seed=0)
            held_out = rows_of(one_each, base.tokenizer)
            measured = HeldOut(lambda i: held_out.collate([held_out.row(i)], row), one_each.rows_in_epoch(0))
            validate = Validation(tuned.engine, {"held out": measured}, objective)

    def batches(step: int) -> list[Batch]:
        return micro_batches(rows, step * loop.batch_rows, loop.batch_rows, loop.micro_rows, mesh, pad_to)

    learner = tuned.learner(objective, steps)
    trainer = Trainer(learner, batches, steps, loop, Path(config.out), validate, tuned.sidecars)
    return SftRun(config, tuned, training, validation, loader, trainer)
