"""MinHash: near duplicates by 5-word shingles (Broder 1997), in bands as FineWeb does (arXiv 2406.17557, section 3.4).

A signature is 112 numbers, the least of each of 112 hash functions over a document's shingles; two documents agree in
a number with the probability of their Jaccard similarity J. Documents that agree in all 8 numbers of any of 14 bands
become candidates: with probability 1 - (1 - J**8)**14, that is 5% at J = 0.5, 56% at 0.7, 77% at 0.75, 92% at 0.8.

Price: 448 bytes a document; about 13 ns a word in C++, on AVX-512 (numpy, the twin, 20 to 30 times that).

Legend: D documents, H = bands x rows hash functions, B bands, R rows.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arriero.curate.analysis import Analysis
from arriero.curate.spans import FINAL, MULTIPLIER, pointer
from arriero.errors import check
from arriero.system.cpp import load_cpp

NO_SHINGLE = np.uint32(0xFFFFFFFF)
NO_KEY = np.uint64(0)


@dataclass(frozen=True)
class MinHashConfig:
    """How near duplicates are found; the defaults are FineWeb's."""

    ngram: int = 5
    """Words in a shingle."""
    bands: int = 14
    """Bands of a signature; documents that agree in one whole band are candidates."""
    rows: int = 8
    """Hash functions in a band."""
    min_similarity: float = 0.7
    """Candidates whose signatures agree in less than this share of all numbers are no duplicates."""
    seed: int = 1
    """Decides the hash functions; signatures of different seeds cannot be compared."""

    def __post_init__(self) -> None:
        for field in ("ngram", "bands", "rows"):
            value = getattr(self, field)
            check(value >= 1, f"near_dedup.{field} is {value}; it must be at least 1")
        similarity = self.min_similarity
        check(0 <= similarity <= 1, f"near_dedup.min_similarity is {similarity}; it must be from 0 to 1")

    @property
    def hashes(self) -> int:
        """Numbers in a signature."""
        return self.bands * self.rows


def signatures(analysis: Analysis, config: MinHashConfig) -> NDArray[np.uint32]:
    """uint32 [D, H]: entry (d, h) is the least of (a_h x + b_h mod 2**64) >> 32 over the shingles x of document d.

    A shingle is the hash of `ngram` words one after another, as `Analysis.folded` has them (lower case, without accents
    and punctuation, digits as 0). A document with fewer words has none, a signature of `NO_SHINGLE`, and no duplicates.
    """
    words, first = analysis.content
    factors, terms = _functions(config)
    out = np.full((len(analysis), config.hashes), NO_SHINGLE, np.uint32)
    library = load_library()
    if library is None:
        _signatures_slowly(words, first, config.ngram, factors, terms, out)
    else:
        library.signatures(
            pointer(words), pointer(first), ctypes.c_int64(len(analysis)), ctypes.c_int64(config.ngram),
            pointer(factors), pointer(terms), ctypes.c_int64(config.hashes), pointer(out),
        )  # fmt: skip
    return out


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled loop, or None where it cannot be compiled."""
    return load_cpp(Path(__file__).with_suffix(".cpp"), "MinHash signatures through numpy, several times slower")


@functools.cache
def _functions(config: MinHashConfig) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Factors (odd) and terms of the hash functions, uint64 [H] each (multiply-shift, Dietzfelbinger et al. 1997)."""
    random = np.random.Generator(np.random.PCG64(config.seed))
    factors, terms = random.integers(0, 2**64, (2, config.hashes), np.uint64)
    return factors | np.uint64(1), terms


def _signatures_slowly(
    words: NDArray[np.uint64],
    first: NDArray[np.int64],
    ngram: int,
    factors: NDArray[np.uint64],
    terms: NDArray[np.uint64],
    out: NDArray[np.uint32],
) -> None:
    for document, (start, end) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
        if end - start < ngram:
            continue
        shingles = np.zeros(end - start - ngram + 1, np.uint64)
        for i in range(ngram):
            shingles = shingles * np.uint64(MULTIPLIER) ^ words[start + i : end - ngram + 1 + i]
        shingles = _mix(shingles)
        for h in range(len(factors)):
            out[document, h] = (shingles * factors[h] + terms[h] >> np.uint64(32)).min()


def _mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`spans.mix` of an array."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(FINAL)
    return hashes ^ (hashes >> np.uint64(29))


def band_keys(signatures: NDArray[np.uint32], config: MinHashConfig) -> NDArray[np.uint64]:
    """uint64 [D, B]: the hash of each band of each signature; `NO_KEY` where there is no shingle."""
    bands = signatures.reshape(len(signatures), config.bands, config.rows).astype(np.uint64)
    keys = np.full(bands.shape[:2], MULTIPLIER, np.uint64)
    for row in range(config.rows):
        keys = (keys ^ bands[:, :, row]) * np.uint64(MULTIPLIER)
    keys = np.maximum(_mix(keys), np.uint64(1))
    keys[(signatures == NO_SHINGLE).all(axis=1)] = NO_KEY
    return keys


def keep(
    keys: NDArray[np.uint64], signatures: NDArray[np.uint32] | None = None, config: MinHashConfig | None = None
) -> NDArray[np.bool_]:
    """Which documents are the first of their cluster of near duplicates, bool [D]; see `clusters`."""
    return clusters(keys, signatures, config) == np.arange(len(keys))


def clusters(
    keys: NDArray[np.uint64], signatures: NDArray[np.uint32] | None = None, config: MinHashConfig | None = None
) -> NDArray[np.int64]:
    """For each document the first one (in corpus order) of its cluster, int64 [D]: itself where nothing is like it.

    keys: [D, B], of the whole corpus. Documents that share a key in any band are joined, and what is joined to the
    same document belongs together. With `signatures` ([D, H]) two are joined only where these agree in at least
    `config.min_similarity` of their numbers, so that chance collisions do not chain unlike documents together: in
    each bucket every document is compared with the first, those unlike it with the first of them, and so on `ROUNDS`
    times. The result is a function of the arrays alone. Both may be memory-mapped files; a file of keys laid out [B,
    D] and passed as its transpose is read only once. Memory: about 30 bytes a document, and up to 1 GB to sort.
    """
    threshold = (config or MinHashConfig()).min_similarity
    parent = np.arange(len(keys))
    parts = -(-len(keys) // SORT_AT_ONCE)
    for band in range(keys.shape[1]):
        for part in range(parts):
            column = np.asarray(keys[:, band])
            members = np.flatnonzero((column % np.uint64(parts) == part) & (column != NO_KEY))
            column = column[members]
            order = np.argsort(column, kind="stable")  # equal keys stay in corpus order
            _join_buckets(parent, members[order], column[order], signatures, threshold)
    return parent


ROUNDS = 8
"""How many clusters are looked for in one bucket."""
SORT_AT_ONCE = 1 << 24
"""Documents sorted in memory at a time; more are taken in parts of the space of keys."""
_COMPARE_AT_ONCE = 1 << 14


def _join_buckets(
    parent: NDArray[np.int64],
    members: NDArray[np.int64],
    column: NDArray[np.uint64],
    signatures: NDArray[np.uint32] | None,
    threshold: float,
) -> None:
    """Join the documents `members` that have equal keys in `column`, which is sorted."""
    for _ in range(ROUNDS):
        starts = np.flatnonzero(np.append(True, column[1:] != column[:-1])) if len(column) else np.empty(0, np.int64)
        sizes = np.diff(np.append(starts, len(column)))
        leaders = np.repeat(members[starts], sizes)
        others = leaders != members
        leaders, members, column = leaders[others], members[others], column[others]
        if not len(members):
            return
        alike = np.ones(len(members), bool)
        if signatures is not None:
            for i in range(0, len(members), _COMPARE_AT_ONCE):
                a, b = (signatures[which[i : i + _COMPARE_AT_ONCE]] for which in (leaders, members))
                alike[i : i + _COMPARE_AT_ONCE] = (a == b).mean(axis=1) >= threshold
        _join(parent, leaders[alike], members[alike])
        members, column = members[~alike], column[~alike]


def _join(parent: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Put the clusters of each pair together. `parent` points at the first of each cluster, before and after."""
    while len(left):
        a, b = parent[left], parent[right]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(up := parent[parent], parent):
            parent[:] = up
        apart = parent[left] != parent[right]
        left, right = left[apart], right[apart]
