"""An objective with a term for each denominator (tokens, documents, pairs, groups), and rows for it."""

import numpy as np
import torch
import torch.nn.functional as F

from arriero.data.batch import IGNORED, Row, next_token_targets, shifted
from arriero.distributed.objective import Objective
from arriero.losses.lm import token_logprobs

WEIGHTS = {"token": 1.0, "document": 0.7, "pair": 1.3, "group": 0.2}


def mixed_row(index: int, vocabulary: int) -> Row:
    """A prompt, a chosen and a rejected answer to it, and perhaps a third: one pair and one group, numbered `index`."""
    rng = np.random.default_rng(index)
    n_answers = int(rng.integers(2, 4))
    lengths = rng.integers(2, 12, 1 + n_answers)
    documents = [rng.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
    trained = [np.zeros(lengths[0], dtype=bool), *(rng.random(n) < 0.8 for n in lengths[1:])]
    return Row(
        tokens=np.concatenate(documents),
        targets=np.concatenate([next_token_targets(*one) for one in zip(documents, trained, strict=True)]),
        lengths=lengths,
        leads=(-1, *[0] * n_answers),
        token_extras={"weight": np.concatenate([shifted(rng.random(n), 0.0) for n in lengths])},
        document_extras={
            "pair": np.array([-1, index, index, -1][: 1 + n_answers]),
            "side": np.array([0, 1, -1, 0][: 1 + n_answers]),
            "group": np.array([-1, *[index] * n_answers]),
        },
    )


def mixed() -> Objective:
    """Weighted cross-entropy a token, its mean a document, a preference a pair, a square of the sum a group."""

    def sums(model, batch):
        hidden = model.model(batch.tokens, batch.layout).flatten(0, 1)
        chosen, entropy = token_logprobs(hidden, model.head.weight, batch.targets.flatten(), entropy=True)
        answers, counted = batch.document_sums(chosen[None])
        lengths, _ = batch.document_sums((batch.targets != IGNORED).to(chosen.dtype))
        pair, side, group = (batch.document_extras[name] for name in ("pair", "side", "group"))
        counted = counted.to(answers.dtype)
        margins, once = by(pair, answers * side), by(pair, counted * (side > 0))
        squares, own = by(group, answers).square(), by(group, counted) > 0
        return {
            "token": -(chosen * batch.token_extras["weight"].flatten()).sum(),
            "document": -(counted * answers / lengths.clamp(min=1)).sum(),
            "pair": -(F.logsigmoid(0.1 * margins) * once).sum(),
            "group": (squares * own).sum() * 1e-3,
            "entropy": entropy.detach().sum(),
        }

    def counts(batch):
        return {
            "token": float((batch.token_extras["weight"] * (batch.targets != IGNORED)).sum()),
            "document": len(batch.documents.lengths),
            "pair": len(ids(batch.document_extras["pair"])),
            "group": len(ids(batch.document_extras["group"])),
            "entropy": batch.n_trained,
        }

    return Objective(sums, counts, WEIGHTS)


def ids(numbers: torch.Tensor) -> torch.Tensor:
    """Those that documents are of; -1 is none."""
    return numbers[numbers >= 0].unique()


def by(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """values [n] summed over the documents of each number."""
    return torch.stack([values[numbers == i].sum() for i in ids(numbers).tolist()] or [values.sum() * 0])
