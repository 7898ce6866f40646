"""Direct preference optimisation and its relatives: the recipe behind `arriero dpo`.

The model makes the better of two answers more probable, relative to what it was (losses/preference.py has the losses
and their papers). All answers to a prompt are in one row behind it. Ends with `adapter/` or `model/`, as fine-tuning.

Llama 3's two changes (arXiv 2407.21783, section 4.1.4) are settings: `mask_format` leaves the tokens of the chat format
out of the preference; `nll` adds the better answer's likelihood, in which they stay, so that it is learned to stop.

KTO compares each answer with a reference point: the divergence of the model from its reference, estimated at each step
on answers to other prompts, over the whole global batch, so that accumulation is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from arriero.data.batch import Batch, Row
from arriero.data.preference_formats import KINDS
from arriero.data.preference_loader import PreferenceLoader
from arriero.data.preferences import PreferenceDataset
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh
from arriero.errors import DataError
from arriero.train.batches import micro_batches
from arriero.train.loop import Outcome, Trainer
from arriero.train.preference_config import REFERENCE_FREE, DpoConfig
from arriero.train.preference_objective import preference_objective
from arriero.train.preference_rows import PreferenceRun, open_preferences
from arriero.train.recipe import alone, execute
from arriero.train.reference import ReferencePoint, References, reference_file, with_reference
from arriero.train.samples import answer, said, write_samples
from arriero.train.tuned import Base, open_base
from arriero.train.validation import HeldOut, Validation


def main(config: DpoConfig) -> Outcome:
    """Train as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    return execute(config, "dpo", build)


@dataclass(frozen=True)
class DpoRun(PreferenceRun):
    """Everything a run is made of, ready for step 1."""

    config: DpoConfig

    def sample(self, when: Literal["before", "after"]) -> None:
        """Answer a few held-out prompts."""
        if (model := self.tuned.engine.whole_model()) is None:
            return
        answers = answer(model, self.tuned.base.tokenizer, self.validation, self.config.samples)
        write_samples(Path(self.config.out), answers, when)


def build(config: DpoConfig, console: Console, mesh: Mesh | None = None) -> DpoRun:
    """Load, tokenise, adapt, split over `mesh` (None: one process), ask the reference: everything up to step 1."""
    loop, data, mesh = config.loop, config.data, mesh or alone()
    mesh.config.check_batch(loop.batch_rows, loop.micro_rows, data.seq_len)
    base = open_base(config, longest=data.seq_len)
    pairs = config.loss != "kto"
    training, validation = open_preferences(data, base.tokenizer, mesh, console, loop.seed, pairs=pairs)
    if not pairs:
        _check_labels(training)
    loader = _loader(config, base, training, loop.seed)
    steps = loop.steps or max(1, math.ceil(loop.epochs * loader.rows_in_epoch(0) / loop.batch_rows))
    tuned = base.on(mesh, tokens=steps * loop.batch_rows * data.seq_len)
    engine, training_rows = tuned.engine, range(min(steps * loop.batch_rows, loader.rows_in_epoch(0)))
    held_out = None if validation is None else _loader(config, base, validation, 0)
    point = ReferencePoint(loader, engine) if config.loss == "kto" else None
    if config.reference == "cached" and config.loss not in REFERENCE_FREE:
        rows = [loader.row(i) for i in training_rows]
        others = [loader.mismatched(i) for i in training_rows] if point is not None else []
        loader.reference = _ask_reference(base, engine, loader, rows + others, console)
        if held_out is not None:
            rows = [held_out.row(i) for i in range(held_out.rows_in_epoch(0))]
            held_out.reference = _ask_reference(base, engine, held_out, rows, console)
    pad_to, row = (tuned.padded_to(n * data.seq_len, data.packing) for n in (loop.micro_rows, 1))
    switched = config.loss not in REFERENCE_FREE and config.reference == "switched"

    def batches(step: int) -> list[Batch]:
        first = step * loop.batch_rows
        found = micro_batches(loader, first, loop.batch_rows, loop.micro_rows, mesh, pad_to)
        if switched:
            found = with_reference(engine, found)
        return found if point is None else point.put(found, first, loop.batch_rows, loop.micro_rows)

    def held_out_batch(i: int) -> Batch:
        assert held_out is not None
        batch = held_out.collate([held_out.row(i)], row).to(mesh.device)
        [batch] = with_reference(engine, [batch]) if switched else [batch]
        return batch if point is None else point.on(batch)

    objective = preference_objective(config)
    validate = None
    if held_out is not None:
        measured = {"held out": HeldOut(held_out_batch, held_out.rows_in_epoch(0))}
        tokenizer, asked = tuned.base.tokenizer, validation if config.samples else None
        validate = Validation(
            engine,
            measured,
            objective,
            None if asked is None else lambda: said(engine, tokenizer, asked, config.samples),
        )
    learner = tuned.learner(objective, steps)
    trainer = Trainer(learner, batches, steps, loop, Path(config.out), validate, tuned.sidecars)
    return DpoRun(config, tuned, training, validation, loader, trainer)


def _loader(config: DpoConfig, base: Base, rows: PreferenceDataset, seed: int) -> PreferenceLoader:
    ids = base.tokenizer.special_ids.values() if config.mask_format else ()
    data = config.data
    return PreferenceLoader(rows, data.seq_len, seed, data.packing, taken=data.answers, format_ids=ids)


def _ask_reference(
    base: Base, engine: Engine, loader: PreferenceLoader, rows: Sequence[Row], console: Console
) -> NDArray[np.float32]:
    """What the model, as it begins, says of the answers in `rows`, at their numbers; nan elsewhere."""
    data = loader.dataset
    facts = {"rows": data.answers.directory.name, "format": loader.format_ids.tolist(), "seq_len": loader.seq_len}
    file = reference_file(base, facts)
    references = References(file, len(data.values) + data.n_cached, engine.mesh)
    references.fill(engine, loader, rows, console)
    return references.values


def _check_labels(rows: PreferenceDataset) -> None:
    """Refuse scores: they say which answer is better, and not which is good."""
    scored = rows.kinds == KINDS.index("scored")
    if scored.any():
        raise DataError(
            f"{rows.where(int(np.argmax(scored)))}: its answers have scores, and kto learns which are good; give each "
            "answer a row with 'label', or take another loss"
        )
