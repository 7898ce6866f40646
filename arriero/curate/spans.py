"""Parts of the documents of a batch (words, lines, paragraphs) as flat arrays, and the hash that all of curation uses.

The hash of a text is a fold over its code points, h = (h ^ c) * M modulo 2**64, mixed at the end: no seed and no
platform dependence, so hashes may be stored, merged between machines and compared between versions.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# bits of `words.kind`
HAS_LETTER = 1
"""At least one alphabetic character."""
IS_SYMBOL = 2
"""Punctuation, symbols and control characters only: a token, but no word."""
AFTER_SPACE = 4
"""First of the tokens in a run without white space."""
ENDS_SENTENCE = 8
"""A single . ! ? or its like in another script."""

# bits of `lines.kind`
BLANK = 1
"""Nothing but white space."""
ENDS_TERMINAL = 2
"""The last character ends a sentence (trailing white space is not taken off)."""
STARTS_BULLET = 4
"""The first character that is no space is a bullet or a hyphen."""
ENDS_ELLIPSIS = 8
"""Ends in ... or …, trailing white space aside."""

MASK = (1 << 64) - 1
MULTIPLIER = 0x9E3779B97F4A7C15
FINAL = 0xD6E8FEB86659FD93


@dataclass(frozen=True)
class Spans:
    """N pieces of a batch, in the order of the text.

    start: int64 [N], index into the joined characters of the batch. length: int64 [N], characters.
    hash: uint64 [N], of the characters. kind: uint8 [N], bits named above. first: int64 [D + 1]: the pieces of document
    d are those from first[d] to first[d + 1].
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    hash: NDArray[np.uint64]
    kind: NDArray[np.uint8]
    first: NDArray[np.int64]

    @property
    def count(self) -> NDArray[np.int64]:
        """Pieces of each document, int64 [D]."""
        return np.diff(self.first)

    @property
    def document(self) -> NDArray[np.int64]:
        """The document of each piece, int64 [N]."""
        return np.repeat(np.arange(len(self.first) - 1), self.count)

    def per_document(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Sum of a value of each piece ([N], integers or booleans) over each document, int64 [D]."""
        total = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=total[1:])
        return total[self.first[1:]] - total[self.first[:-1]]

    def having(self, kind: int) -> NDArray[np.bool_]:
        """Which pieces have any of these bits, bool [N]."""
        return (self.kind & kind) > 0

    @functools.cached_property
    def repeated(self) -> NDArray[np.bool_]:
        """Which pieces occur earlier in their document, bool [N]. Sorts: about 0.1 microseconds each."""
        key = self.hash ^ (self.document.astype(np.uint64) * np.uint64(MULTIPLIER))  # documents stay apart
        again = np.ones(len(key), bool)
        again[np.unique(key, return_index=True)[1]] = False
        return again


def mix(value: int) -> int:
    """The last step of a hash: every bit of the input moves every bit of the result."""
    value = ((value ^ (value >> 32)) * FINAL) & MASK
    return value ^ (value >> 29)


def hash_points(points: Iterable[int]) -> int:
    """The hash of code points, or of any 64-bit numbers: those of words make the hash of an n-gram."""
    value = MULTIPLIER
    for point in points:
        value = ((value ^ point) * MULTIPLIER) & MASK
    return mix(value)


def hash_text(text: str) -> int:
    """The hash of a text, as `Spans.hash` has it."""
    return hash_points(map(ord, text))


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """The address of a contiguous array, for C++; the pointer keeps the array alive."""
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)
