"""Reward models: the recipe behind `arriero reward`.

A Llama with a head of one score, learned from which of two answers is better (arXiv 2307.09288, section 3.2.2). The
score is read at the token that ends an answer; each answer's is what it would be alone, though all answers to a prompt
are in one row behind it, as Llama 3 has its ranked triples (2407.21783, section 4.1.2). Ends with `model/`, a Hugging
Face model for sequence classification, with an adapter folded in, and with what the held-out pairs say of it: accuracy
by rating, calibration, and whether length is what it rewards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console

from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.scorer import export_scorer, padding_apart
from arriero.data.batch import Batch
from arriero.data.preference_loader import PreferenceLoader
from arriero.data.preferences import PreferenceDataset
from arriero.distributed.mesh import Mesh
from arriero.errors import DataError
from arriero.io.files import write_json
from arriero.train.batches import micro_batches
from arriero.train.loop import Outcome, Trainer
from arriero.train.preference_config import RewardConfig
from arriero.train.preference_rows import PreferenceRun, open_preferences
from arriero.train.ranking_objective import end_scores, margins_of, ranking
from arriero.train.recipe import DTYPES, alone, execute
from arriero.train.reward_report import FILE, held_out_pairs
from arriero.train.tuned import open_base
from arriero.train.validation import HeldOut, Validation


def main(config: RewardConfig) -> Outcome:
    """Train as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    return execute(config, "reward", build)


@dataclass(frozen=True)
class RewardRun(PreferenceRun):
    """Everything a run is made of, ready for step 1."""

    config: RewardConfig

    def sample(self, when: Literal["before", "after"]) -> None:
        """Score the held-out answers, once the model is trained: reward.json, of which the report makes its figures."""
        if when == "before" or self.validation is None or (model := self.tuned.engine.whole_model()) is None:
            return
        loader = PreferenceLoader(self.validation, self.config.data.seq_len, 0, self.config.data.packing)
        scores = np.full(len(self.validation.values), np.nan)
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call]
            for index in range(loader.rows_in_epoch(0)):
                batch = loader.collate([loader.row(index)]).to(model.device)
                answers = batch.document_extras["answer"].cpu().numpy()
                of = batch.documents.sums(end_scores(model, batch)).cpu().numpy()
                scores[answers[answers > 0] - 1] = of[answers > 0]
        write_json(Path(self.config.out) / FILE, held_out_pairs(self.validation, scores))

    def export(self) -> Path:
        """Write the model, adapter folded in, for sequence classification; returns its directory."""
        directory, base = Path(self.config.out) / "model", self.tuned.base
        beside = read_beside(base.weights.source).for_training(base.tokenizer)
        dtype = DTYPES[self.config.loop.precision]
        export_scorer(self.tuned.engine, directory, base.tokenizer, dtype=dtype, beside=beside)
        return directory


def build(config: RewardConfig, console: Console, mesh: Mesh | None = None) -> RewardRun:
    """Load, tokenise, adapt, split over `mesh` (None: one process): everything up to step 1."""
    loop, data, mesh = config.loop, config.data, mesh or alone()
    mesh.config.check_batch(loop.batch_rows, loop.micro_rows, data.seq_len)
    base = open_base(config, longest=data.seq_len, head="score")
    padding_apart(base.tokenizer)  # refused now rather than when the model is written
    training, validation = open_preferences(data, base.tokenizer, mesh, console, loop.seed)
    loader = _loader(config, training, loop.seed)
    steps = loop.steps or max(1, math.ceil(loop.epochs * loader.rows_in_epoch(0) / loop.batch_rows))
    tuned = base.on(mesh, tokens=steps * loop.batch_rows * data.seq_len)
    pad_to, row = (tuned.padded_to(n * data.seq_len, data.packing) for n in (loop.micro_rows, 1))
    if config.safety and not (training.safe >= 0).any():
        raise DataError(
            f"{training.where(0)}: safety is {config.safety}, and no row says which answers are safe; add chosen_safe "
            "and rejected_safe, or set safety to 0"
        )

    def batches(step: int) -> list[Batch]:
        return micro_batches(loader, step * loop.batch_rows, loop.batch_rows, loop.micro_rows, mesh, pad_to)

    objective = ranking(config.safety)
    validate = None
    if validation is not None:
        held_out = _loader(config, validation, 0)
        measured = HeldOut(lambda i: held_out.collate([held_out.row(i)], row), held_out.rows_in_epoch(0))
        validate = Validation(tuned.engine, {"held out": measured}, objective)
    learner = tuned.learner(objective, steps)
    trainer = Trainer(learner, batches, steps, loop, Path(config.out), validate, tuned.sidecars)
    return RewardRun(config, tuned, training, validation, loader, trainer)


def _loader(config: RewardConfig, rows: PreferenceDataset, seed: int) -> PreferenceLoader:
    data = config.data
    return PreferenceLoader(
        rows, data.seq_len, seed, data.packing, taken=data.answers, margins=margins_of(config, rows)
    )
