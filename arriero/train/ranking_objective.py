"""The objective of reward models: from a batch of answers behind their prompts to sums over pairs and answers.

Terms: `ranking` a pair (losses/ranking.py), and with a weight `safety`, an answer of which it is known whether it is
safe (arXiv 2307.09288, section 3.2.2). Beside them are recorded accuracy and margin, a pair, and the score, an answer.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from arriero.data.batch import Batch
from arriero.data.preference_formats import RATINGS
from arriero.data.preference_loader import compared, n_answers, n_pairs
from arriero.data.preferences import PreferenceDataset
from arriero.distributed.objective import Objective
from arriero.errors import DataError
from arriero.losses.ranking import pairwise, safety
from arriero.model.llama import Llama
from arriero.train.preference_config import RewardConfig

MARGINS = {"small": (1.0, 2 / 3, 1 / 3, 0.0), "large": (3.0, 2.0, 1.0, 0.0)}  # by rating: 2307.09288, table 27


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
