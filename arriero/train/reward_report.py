"""What held-out pairs say of a reward model: accuracy by rating, calibration, and whether it rewards length.

Calibration: a model that scores two answers s and t says that the first is better with probability sigmoid(s - t). Of
the pairs where it is sure to 80%, 80% should be as it says. Length: how often it prefers the longer answer, against how
often the longer one is better.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from arriero.data.preference_formats import RATINGS
from arriero.data.preferences import PreferenceDataset
from arriero.errors import CheckpointError
from arriero.eval.bootstrap import interval, ratio
from arriero.io.reading import read_json
from arriero.show.page import DARK, LIGHT, Theme, dress, png

FILE = "reward.json"
BINS = 5  # of the model's certainty, from 50 to 100%


def held_out_pairs(rows: PreferenceDataset, scores: NDArray[np.float64]) -> dict[str, Any]:
    """The numbers of the report, from the scores of all answers, [S]."""
    better, worse, longer, rating, row = [], [], [], [], []
    lengths = np.array([int(rows.answers.trained(i).sum()) for i in range(len(rows.values))])
    for i in range(len(rows)):
        of = np.array(rows.of_row(i))
        first, second = np.nonzero(rows.values[of][:, None] > rows.values[of][None, :])
        better.append(scores[of[first]])
        worse.append(scores[of[second]])
        longer.append(np.sign(lengths[of[first]] - lengths[of[second]]))
        rating.append(np.full(len(first), rows.ratings[i]))
        row.append(np.full(len(first), i))
    high, low, length, level, of_row = (np.concatenate(parts) for parts in (better, worse, longer, rating, row))
    right = high > low
    scored = np.concatenate([np.array(rows.of_row(i)) for i in range(len(rows))])
    differs = length != 0
    return {
        "pairs": len(right),
        "accuracy": _mean(right),
        "accuracy_interval": _interval(right, of_row),
        "accuracy_by_rating": {
            name: {"pairs": int((level == k).sum()), "accuracy": _mean(right[level == k])}
            for k, name in enumerate(RATINGS)
            if (level == k).any()
        },
        "calibration": _calibration(high - low),
        "length": {
            "better_is_longer": _mean(length[differs] > 0),
            "preferred_is_longer": _mean((length[differs] > 0) == right[differs]),
            "accuracy_where_better_is_longer": _mean(right[length > 0]),
            "accuracy_where_better_is_shorter": _mean(right[length < 0]),
            "correlation_of_score_and_length": _correlation(scores[scored], lengths[scored]),
        },
        "scores": {"mean": _mean(scores[scored]), "deviation": float(np.std(scores[scored]))},
    }


def _interval(right: NDArray[np.bool_], of_row: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """95% bounds of the accuracy. Rows are drawn again, not pairs: pairs of one prompt share answers."""
    _, at = np.unique(of_row, return_inverse=True)
    if not len(at):
        return None, None
    found = interval(ratio(np.bincount(at, weights=right).tolist(), np.bincount(at).tolist()), 2000, 0)
    return found.low, found.high


def _calibration(margins: NDArray[np.float64]) -> list[dict[str, float | None]]:
    """How sure the model is of pairs, and how often it is right, by bins of how sure it is."""
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {"pairs": int((bins == k).sum()), "sure": float(sure[bins == k].mean()), "right": _mean(margins[bins == k] > 0)}
        for k in range(BINS)
        if (bins == k).any()
    ]


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and np.std(a) > 0 and np.std(b) > 0 else None


# -- report ------------------------------------------------------------------------------------------------------------


def figures(run_dir: Path) -> list[dict[str, str]]:
    """Pictures for the report of a run that left FILE: title, light, dark (PNG, base64), and a caption."""
    try:
        found = read_json(run_dir / FILE, missing={})
    except CheckpointError:
        return []
    if not found:
        return []
    drawn = {
        name: base64.b64encode(_drawn(found, theme)).decode() for name, theme in (("light", LIGHT), ("dark", DARK))
    }
    return [{"title": "Held-out pairs", "caption": _caption(found), **drawn}]


def _caption(found: dict[str, Any]) -> str:
    length = found["length"]
    low, high = found.get("accuracy_interval", (None, None))
    between = f" (95% interval {low:.1%} to {high:.1%})" if low is not None else ""
    text = f"{found['pairs']:,} pairs, {_share(found['accuracy'])} of them scored as they were judged{between}."
    if length["better_is_longer"] is not None:
        text += (
            f" The better answer is the longer one in {_share(length['better_is_longer'])} of the pairs whose lengths "
            f"differ, and the model prefers the longer one in {_share(length['preferred_is_longer'])}."
        )
    if length["correlation_of_score_and_length"] is not None:
        text += f" Score and length correlate at {length['correlation_of_score_and_length']:+.2f}."
    return text


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _drawn(found: dict[str, Any], theme: Theme) -> bytes:
    """Accuracy by rating at the left, calibration at the right."""
    figure = Figure(figsize=(9, 3.6), dpi=160, facecolor=theme.background, layout="constrained")
    left, right = figure.subplots(1, 2)
    bars = {"all": found["accuracy"]} | {n: of["accuracy"] for n, of in found["accuracy_by_rating"].items()}
    left.barh(range(len(bars)), [value or 0 for value in bars.values()], color=theme.first)
    left.set_yticks(range(len(bars)), list(bars))
    left.axvline(0.5, color=theme.second, linewidth=1)
    left.set_xlim(0, 1)
    left.invert_yaxis()
    left.set_xlabel("accuracy (chance 0.5)", color=theme.text)
    points = found["calibration"]
    right.plot([0.5, 1], [0.5, 1], color=theme.text, linewidth=1, linestyle="--")
    right.plot([p["sure"] for p in points], [p["right"] for p in points], color=theme.second, marker="o")
    right.set_xlabel("how sure the model is", color=theme.text)
    right.set_ylabel("how often it is right", color=theme.text)
    right.set_ylim(0, 1.05)
    dress((left, right), theme)
    return png(figure)
