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
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from arriero.checkpoint.beside import read_beside
from arriero.checkpoint.scorer import export_scorer, padding_apart
from arriero.data.batch import Batch
from arriero.data.preference_formats import RATINGS
from arriero.data.preference_loader import PreferenceLoader, compared, n_answers, n_pairs
from arriero.data.preferences import PreferenceDataset
from arriero.distributed.mesh import Mesh
from arriero.distributed.objective import Objective
from arriero.errors import DataError
from arriero.io.files import write_json
from arriero.losses.ranking import pairwise, safety
from arriero.model.llama import Llama
from arriero.train.batches import micro_batches
from arriero.train.loop import Outcome, Trainer
from arriero.train.preference_config import RewardConfig
from arriero.train.preference_rows import PreferenceRun, open_preferences
from arriero.train.recipe import DTYPES, alone, execute
from arriero.train.reward_report import FILE, held_out_pairs
from arriero.train.tuned import open_base
from arriero.train.validation import HeldOut, Validation

MARGINS = {"small": (1.0, 2 / 3, 1 / 3, 0.0), "large": (3.0, 2.0, 1.0, 0.0)}  # by rating: 2307.09288, table 27


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


def margins_of(config: RewardConfig, rows: PreferenceDataset) -> NDArray[np.float32] | None:
    """How much higher the better answers of each row are to score, [n]; None for not at all."""
    if config.margin == "none":
        return None
    if config.margin == "given":
        found, column = rows.margins, "margin"
    else:
        by_rating = np.array([*MARGINS[config.margin], np.nan], dtype=np.float32)
        found, column = by_rating[rows.ratings], "rating"
    if np.isnan(found).any():
        i = int(np.argmax(np.isnan(found)))
        known = "" if column == "margin" else f" (one of {', '.join(map(repr, RATINGS))})"
        raise DataError(
            f"{rows.where(i)}: margin is {config.margin}, and the row has no {column!r}; give it one{known}, or set "
            "margin to none"
        )
    return found


def end_scores(model: Llama, batch: Batch) -> Tensor:
    """The score at each token that ends an answer, 0 elsewhere, fp32 [1, N]."""
    hidden = model.model(batch.tokens, batch.layout)
    return F.linear(hidden.float(), model.head.weight.float())[..., 0] * batch.token_extras["end"]


def ranking(safety_weight: float = 0.0) -> Objective:
    """The ranking loss a pair, and with a weight the safety loss an answer of which it is known whether it is safe."""

    def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
        extras = batch.document_extras
        scores, counted = batch.document_sums(end_scores(model, batch))
        pairs = compared(extras)
        once = counted[pairs.better].to(scores.dtype)
        better, worse = scores[pairs.better], scores[pairs.worse]
        found = {"ranking": (pairwise(better, worse, pairs.margins) * once).sum()}
        if safety_weight:
            known = (extras["safe"] > 0) * counted.to(scores.dtype)
            found["safety"] = (safety(scores, extras["safe"] == 2) * known).sum()
        with torch.no_grad():
            found["accuracy"] = ((better > worse) * once).sum()
            found["margin"] = ((better - worse) * once).sum()
            found["score"] = (scores * counted * (extras["answer"] > 0)).sum()
        return found

    def counts(batch: Batch) -> dict[str, float]:
        pairs, answers = float(n_pairs(batch)), float(n_answers(batch))
        known = {"safety": float((batch.document_extras["safe"] > 0).sum())} if safety_weight else {}
        return {"ranking": pairs, "accuracy": pairs, "margin": pairs, "score": answers, **known}

    weights = {"ranking": 1.0, "safety": safety_weight} if safety_weight else {"ranking": 1.0}
    return Objective(sums, counts, weights)
