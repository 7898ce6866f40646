"""Counts repeated n-grams within groups of words (a document, a line), for Gopher's and Llama 3's rules.

Words are compared by hash, n-grams by the hash of their words' hashes. An n-gram can only repeat where both of its
(n-1)-grams do, so each n examines only the candidates left by n - 1, and a text without repetition costs two passes,
about 20 ns a word. The C++ and the Python below it give equal numbers; the Python is a hundred times slower.

Legend: W words, G groups, group g being the words from first[g] to first[g + 1].
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arriero.curate.spans import pointer
from arriero.system.cpp import load_cpp

Int = NDArray[np.int64]


def top_ngram(hashes: NDArray[np.uint64], lengths: Int, first: Int, sizes: tuple[int, ...]) -> Int:
    """Characters of the most frequent n-gram (the earliest of equals), spaces included, times its count: [G, sizes].

    0 where a group has no n-gram of that size. sizes: ascending. (Rae et al. 2021, table A1, as datatrove counts.)
    """
    return _count("top_ngram", _top_slowly, hashes, lengths, first, sizes)


def duplicate_ngrams(hashes: NDArray[np.uint64], lengths: Int, first: Int, sizes: tuple[int, ...]) -> Int:
    """Characters in n-grams seen before, without overlap, reading from left to right, spaces excluded: [G, sizes].

    After a repeated n-gram, counting continues behind it, so nothing counts twice. sizes: ascending. (The same table.)
    """
    return _count("duplicate_ngrams", _duplicate_slowly, hashes, lengths, first, sizes)


def ngram_coverage(hashes: NDArray[np.uint64], lengths: Int, first: Int, sizes: tuple[int, ...]) -> Int:
    """Characters of words in any n-gram that occurs more than once in the group, each word once: [G, sizes]."""
    return _count("ngram_coverage", _coverage_slowly, hashes, lengths, first, sizes)


def _count(
    name: str, slow: Callable[..., int], hashes: NDArray[np.uint64], lengths: Int, first: Int, sizes: tuple[int, ...]
) -> Int:
    assert list(sizes) == sorted(sizes) and all(size > 1 for size in sizes)
    groups, library = len(first) - 1, load_library()
    out = np.zeros((groups, len(sizes)), np.int64)
    if library is None:
        words, letters = hashes.tolist(), lengths.tolist()
        for group, (start, end) in enumerate(pairwise(first.tolist())):
            out[group] = [slow(words[start:end], letters[start:end], n) for n in sizes]
        return out
    array = np.array(sizes, np.int64)
    getattr(library, name)(
        pointer(hashes), pointer(lengths), pointer(first), ctypes.c_int64(groups), pointer(array),
        ctypes.c_int64(len(sizes)), pointer(out),
    )  # fmt: skip
    return out


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they cannot be compiled."""
    return load_cpp(Path(__file__).with_suffix(".cpp"), "counting n-grams in Python, about a hundred times slower")


def _ngrams(words: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _top_slowly(words: list[int], lengths: list[int], n: int) -> int:
    ngrams = _ngrams(words, n)
    if not ngrams:
        return 0
    top, count = Counter(ngrams).most_common(1)[0]
    at = ngrams.index(top)
    return (sum(lengths[at : at + n]) + n - 1) * count


def _duplicate_slowly(words: list[int], lengths: list[int], n: int) -> int:
    ngrams, seen, characters, i = _ngrams(words, n), set(), 0, 0
    while i < len(ngrams):
        if ngrams[i] in seen:
            characters += sum(lengths[i : i + n])
            i += n
        else:
            seen.add(ngrams[i])
            i += 1
    return characters


def _coverage_slowly(words: list[int], lengths: list[int], n: int) -> int:
    ngrams = _ngrams(words, n)
    counts = Counter(ngrams)
    covered = {i + j for i, ngram in enumerate(ngrams) if counts[ngram] > 1 for j in range(n)}
    return sum(lengths[i] for i in covered)
