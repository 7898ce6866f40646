"""A quality classifier that the user trains: good examples against random ones, as Llama 1 and 3 choose web pages.

fastText's kind (Joulin et al. 2016): hashed word 1- and 2-grams into a linear model,

    p(good) = sigmoid(b + sum_j w_j / sqrt(n)),    j over the n different buckets that occur in the document

trained with AdaGrad on the logistic loss, both classes weighing the same. There is no embedding layer: for two classes
a linear layer behind an average of embeddings is a linear model. (fastText's own package would clash with the
prediction-only build that language identification uses, and writes a format of its own.)

Price: 33 microseconds a document of 560 words to score once it is analysed, 4 MB a model; training holds 4 bytes for
each different n-gram of each document, and takes 0.3 s for each thousand documents. The file is safetensors: the
weights, and how they were made, with held-out accuracy and AUC, as its metadata.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import save_file

from arriero.curate.analysis import Analysis, analyse
from arriero.curate.document import Document
from arriero.curate.rules.llama import _ngram_hashes
from arriero.curate.sources import read_documents
from arriero.errors import DataError
from arriero.io.files import json_text, replaced_file
from arriero.io.paths import as_path, hint
from arriero.io.reading import parse_json, reading
from arriero.show.progress import each
from arriero.show.terminal import notes

FORMAT = "arriero quality classifier 1"
BITS = 20  # of a bucket: 2**20 weights
MAX_WORDS = 2000  # of a document that are looked at, from its beginning
LEAST = 20  # documents of each kind to train on


@dataclass(frozen=True)
class Classifier:
    """weights: float32 [2**BITS]. report: how it was trained and how good it is."""

    weights: NDArray[np.float32]
    bias: float
    report: dict[str, Any]

    def score(self, analysis: Analysis) -> NDArray[np.float64]:
        """The probability of being good of each document, [D]."""
        buckets, first = features(analysis)
        return _sigmoid(_logits(self.weights, self.bias, buckets, first))


def features(analysis: Analysis) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The different buckets of each document's word 1- and 2-grams: uint32 [N], and where each document's begin."""
    words, first = analysis.content
    last = np.minimum(first[1:], first[:-1] + MAX_WORDS)
    document = np.repeat(np.arange(len(analysis)), np.diff(first))
    cells = [np.empty(0, np.uint64)]
    for size in (1, 2):
        grams = _ngram_hashes(words, size) >> np.uint64(64 - BITS)
        owner = document[: len(grams)]
        whole = np.arange(len(grams)) + size <= last[owner]  # no n-gram runs on into the next document
        cells.append((owner.astype(np.uint64) << np.uint64(32) | grams)[whole])
    ordered = np.sort(np.concatenate(cells))  # np.unique alone would hash: a hundred times slower here
    different = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    starts = np.searchsorted(different, np.arange(len(analysis) + 1, dtype=np.uint64) << np.uint64(32))
    return (different & np.uint64(0xFFFFFFFF)).astype(np.uint32), starts


def _logits(
    weights: NDArray[np.float32], bias: float, buckets: NDArray[np.uint32], first: NDArray[np.int64]
) -> NDArray[np.float64]:
    total = np.append(0.0, np.cumsum(weights[buckets], dtype=np.float64))
    counts = np.diff(first)
    return bias + (total[first[1:]] - total[first[:-1]]) / np.sqrt(np.maximum(counts, 1))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


# Training


def train(
    good: Sequence[str | Path],
    against: Sequence[str | Path],
    out: str | Path,
    *,
    epochs: int = 5,
    held_out: float = 0.1,
    max_documents: int = 200_000,
    seed: int = 0,
    text_key: str = "text",
    console: Console | None = None,
) -> Classifier:
    """Train on documents of both kinds and write the classifier to `out`; a share of them is held out to measure it.

    Raises DataError where a kind has too few documents, or `held_out`, `epochs`, `seed` or `out` make no sense.
    """
    console = console or notes()
    if not 0 < held_out < 1 or epochs < 1 or seed < 0:
        raise DataError(
            f"held_out is {held_out}, epochs {epochs} and seed {seed}; give a share between 0 and 1, at least 1 epoch, "
            "and a seed of at least 0"
        )
    out = as_path(out)
    if out.is_dir():
        raise DataError(f"{out} is a directory; give a file for the classifier with --out")
    sets = [
        _read_kind(name, sources, text_key, max_documents, seed, console)
        for name, sources in (("good", good), ("random", against))
    ]
    documents = [features_of for kind in sets for features_of in kind[0]]
    digests = np.concatenate([kind[1] for kind in sets])
    label = np.repeat([1.0, 0.0], [len(kind[0]) for kind in sets])
    test = digests < np.uint64(held_out * 2**64)  # by content: equal documents are on one side
    for name, which in (("good", label == 1), ("random", label == 0)):
        if not (test & which).any() or not (~test & which).any():
            raise DataError(f"no {name} document is left for training or for measuring; give more, or another held_out")
    weights, bias = _fit(documents, label, np.flatnonzero(~test), epochs, seed, console)
    buckets, first = _joined([documents[i] for i in np.flatnonzero(test)])
    score, truth = _sigmoid(_logits(weights, bias, buckets, first)), label[test] == 1
    right = [
        (int((score[truth] >= 0.5).sum()), int(truth.sum())),
        (int((score[~truth] < 0.5).sum()), int((~truth).sum())),
    ]
    report = {
        "good": [str(source) for source in good],
        "random": [str(source) for source in against],
        "trained_on": {"good": int((label[~test] == 1).sum()), "random": int((label[~test] == 0).sum())},
        "held_out": {"good": int(truth.sum()), "random": int((~truth).sum())},
        "accuracy": round(sum(k / n for k, n in right) / 2, 4),  # balanced, so that chance is a half
        "accuracy_interval_95": balanced_interval(right),
        "auc": round(area_under_curve(score, truth), 4),
        "epochs": epochs,
        "seed": seed,
    }
    classifier = Classifier(weights, bias, report)
    save(classifier, out)
    return classifier


def _read_kind(
    name: str, sources: Sequence[str | Path], text_key: str, most: int, seed: int, console: Console
) -> tuple[list[NDArray[np.uint32]], NDArray[np.uint64]]:
    """`_read`, refusing too few documents."""
    found = _read(sources, text_key, most, seed, console)
    if len(found[0]) < LEAST:
        raise DataError(
            f"{len(found[0])} {name} documents in {', '.join(map(str, sources))}; at least {LEAST} are needed"
        )
    return found


def _read(
    sources: Sequence[str | Path], text_key: str, most: int, seed: int, console: Console
) -> tuple[list[NDArray[np.uint32]], NDArray[np.uint64]]:
    """Features of the documents and hashes of their texts; of more than `most`, those with the smallest hash."""
    found: dict[int, NDArray[np.uint32]] = {}
    batch: list[Document] = []

    def take() -> None:
        buckets, first = features(analyse([document.text for document in batch]))
        for i, document in enumerate(batch):
            found[_hash(seed, document.text)] = buckets[first[i] : first[i + 1]]
        if len(found) > 2 * most:
            for key in sorted(found)[most:]:
                del found[key]
        batch.clear()

    for document in each(read_documents(sources, text_key), "reading", console=console):
        batch.append(document)
        if len(batch) == 256:
            take()
    take()
    keys = sorted(found)[:most]
    # The seed's hash chooses and splits: hashes of a chosen subset lie below some bound, so that they are spread again.
    return [found[key] for key in keys], np.array([_hash(seed + 1, str(key)) for key in keys], np.uint64)


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest(), "little")


def _joined(documents: Sequence[NDArray[np.uint32]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    first = np.append(0, np.cumsum([len(document) for document in documents]))
    return np.concatenate([np.empty(0, np.uint32), *documents]), first


def _fit(
    documents: Sequence[NDArray[np.uint32]],
    label: NDArray[np.float64],
    train: NDArray[np.int64],
    epochs: int,
    seed: int,
    console: Console,
    batch: int = 32,
    rate: float = 0.5,
) -> tuple[NDArray[np.float32], float]:
    """AdaGrad on the logistic loss; a class weighs as much as the other, however many documents it has."""
    weights, squares = np.zeros(1 << BITS, np.float32), np.full(1 << BITS, 1e-2, np.float32)
    bias, bias_square = 0.0, 1e-2
    share = label[train].mean()
    importance = np.where(label == 1, 0.5 / share, 0.5 / (1 - share))
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(train) for _ in range(epochs)])
    for start in each(range(0, len(order), batch), "training", console=console):
        chosen = order[start : start + batch]
        buckets, first = _joined([documents[i] for i in chosen])
        error = (_sigmoid(_logits(weights, bias, buckets, first)) - label[chosen]) * importance[chosen] / len(chosen)
        counts = np.diff(first)
        cells, where = np.unique(buckets, return_inverse=True)
        slope = np.bincount(where, np.repeat(error / np.sqrt(np.maximum(counts, 1)), counts), minlength=len(cells))
        squares[cells] += slope**2
        weights[cells] -= rate * slope / np.sqrt(squares[cells])
        bias_square += error.sum() ** 2
        bias -= rate * error.sum() / np.sqrt(bias_square)
    return weights, float(bias)


def balanced_interval(right: Sequence[tuple[int, int]]) -> list[float]:
    """95% of the mean of proportions k / n, by Agresti and Caffo's rule: a right and a wrong answer more in each.

    Unlike the plain normal interval it is not a point where all answers are right (American Statistician 54, 2000).
    """
    shares = [((k + 1) / (n + 2), n + 2) for k, n in right]
    middle = sum(p for p, _ in shares) / len(shares)
    half = 1.96 * math.sqrt(sum(p * (1 - p) / n for p, n in shares)) / len(shares)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def area_under_curve(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """The probability that a good document scores above a random one, ties counting half (Mann and Whitney)."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of equal scores, from 1
    good, bad = truth.sum(), (~truth).sum()
    return float((ranks[inverse][truth].sum() - good * (good + 1) / 2) / (good * bad))


# Files


def save(classifier: Classifier, path: Path) -> None:
    """Write a classifier as safetensors."""
    # one entry only: safetensors writes several in any order, and the same training shall give the same bytes
    metadata = {"arriero": json_text({"format": FORMAT, "bias": classifier.bias, "report": classifier.report})}
    with replaced_file(path) as temporary:
        save_file({"weights": classifier.weights}, temporary, metadata)


@functools.lru_cache(2)
def load(path: str) -> Classifier:
    """Read a classifier. Raises DataError where the file is missing or something else."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; train a classifier with `arriero curate classifier`{hint(path)}")
    again = "train the classifier again"
    with reading(path, "not a safetensors file", again, DataError), safe_open(path, "numpy") as file:
        described = (file.metadata() or {}).get("arriero", "{}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dictionary)
    metadata = parse_json(described, path, again, DataError)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DataError(f"{path}: not a quality classifier; `arriero curate classifier` writes one")
    bias, report, weights = metadata.get("bias"), metadata.get("report"), tensors.get("weights", np.zeros(0))
    if (
        not (isinstance(bias, float) and isinstance(report, dict))
        or weights.dtype != np.float32
        or weights.shape != (2**BITS,)
    ):
        raise DataError(f"{path}: damaged: it does not hold 2^{BITS} weights, a bias and a report; {again}")
    if not (np.isfinite(weights).all() and math.isfinite(bias)):
        raise DataError(f"{path}: its weights are not finite, so it judges nothing; train it again")
    return Classifier(weights, bias, report)
