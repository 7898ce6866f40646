"""One pass over a batch of documents that all rules share: words, lines and paragraphs as flat arrays.

`analyse(texts)` cuts every document of the batch once, in C++, into words (a tokeniser for English prose and code in
the manner of spaCy's rules, which datatrove's filters use, so that published thresholds mean what they meant), lines
and paragraphs, and leaves for each its place, its length, a 64-bit hash and a few bits. A rule is then arithmetic on
these arrays for the whole batch, and no rule looks at a text again unless it edits it.

Price: 13 ns a character on one core; at the peak 18 bytes of memory for each character of English, 90 at the worst
(every character a word), so a few hundred documents at a time. Where no compiler is found, `analysis_twin.py` gives the
same arrays, about a hundred times slower. Hashes are the same everywhere and always: they may be stored and merged
between machines.

Legend: D documents, W words, L lines, P paragraphs. Lengths count code points, as Python does.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.curate import analysis_twin
from arriero.curate.characters import LIMIT, classes, fold
from arriero.curate.lexicon import lexicon
from arriero.curate.spans import Spans, pointer
from arriero.system.cpp import load_cpp


@dataclass(frozen=True)
class Analysis:
    """The analysis of a batch that the rules work on.

    documents: int64 [D + 1], where each text begins in the joined characters. words.hash is of the unchanged
    characters; `folded`, uint64 [W], is of the word in lower case without accents and punctuation, its digits as one
    "0", and 0 for a word with nothing left. Lines end at each "\\n" (an empty line is a line); paragraphs at two or
    more of them, after white space is taken off both ends of the document. alphanumeric: int64 [D], characters for
    which `str.isalnum` holds.
    """

    texts: list[str]
    documents: NDArray[np.int64]
    words: Spans
    folded: NDArray[np.uint64]
    lines: Spans
    paragraphs: Spans
    alphanumeric: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def characters(self) -> NDArray[np.int64]:
        """Length of each text, int64 [D]."""
        return np.diff(self.documents)

    @functools.cached_property
    def content(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of the folded words with letters or digits, uint64 [N]; where each document's begin, int64 [D + 1]."""
        kept = self.folded != 0
        return self.folded[kept], np.append(0, np.cumsum(kept))[self.words.first]

    @functools.cached_property
    def line_words(self) -> NDArray[np.int64]:
        """The words of line l are those from line_words[l] to line_words[l + 1]; int64 [L + 1]."""
        return np.append(np.searchsorted(self.words.start, self.lines.start), len(self.words.start))

    def text(self, spans: Spans, index: int) -> str:
        """The text of one piece."""
        document = int(np.searchsorted(spans.first, index, side="right")) - 1
        start = int(spans.start[index] - self.documents[document])
        return self.texts[document][start : start + int(spans.length[index])]


def analyse(texts: list[str]) -> Analysis:
    """Cut a batch of documents into words, lines and paragraphs, once."""
    documents = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=documents[1:])
    library = load_library()
    arrays = analysis_twin.scan(texts, documents) if library is None else _scan(library, texts, documents)
    return Analysis(texts, documents, *arrays)


def _scan(library: ctypes.CDLL, texts: list[str], documents: NDArray[np.int64]) -> analysis_twin.Scan:
    """`analysis_twin.scan` in C++, into arrays as long as it could need: a page never touched costs nothing."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    count = len(texts)
    most_lines = count + sum(text.count("\n") for text in texts)
    words, lines, paragraphs = (_room(most, count) for most in (len(points), most_lines, most_lines))
    folded, alphanumeric = np.empty(len(points), np.uint64), np.empty(count, np.int64)
    tables = (classes(), fold(), *lexicon())
    sizes = [LIMIT, *(len(hashes) for hashes in lexicon())]
    library.scan(
        pointer(points), pointer(documents), ctypes.c_int64(count),
        *(pointer(table) for table in tables), pointer(np.array(sizes, np.int64)),
        *(pointer(a) for s in (words, lines, paragraphs) for a in (s.start, s.length, s.hash, s.kind, s.first)),
        pointer(folded), pointer(alphanumeric),
    )  # fmt: skip
    return analysis_twin.Scan(
        _cropped(words), folded[: words.first[-1]].copy(), _cropped(lines), _cropped(paragraphs), alphanumeric
    )


def _room(pieces: int, documents: int) -> Spans:
    def empty(dtype: type) -> NDArray[Any]:
        return np.empty(pieces, dtype)

    return Spans(empty(np.int64), empty(np.int64), empty(np.uint64), empty(np.uint8), np.zeros(documents + 1, np.int64))


def _cropped(spans: Spans) -> Spans:
    n = int(spans.first[-1])
    start, length, hash_, kind = spans.start[:n], spans.length[:n], spans.hash[:n], spans.kind[:n]
    return Spans(start.copy(), length.copy(), hash_.copy(), kind.copy(), spans.first)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they cannot be compiled."""
    return load_cpp(Path(__file__).with_suffix(".cpp"), "curating in Python, about a hundred times slower")
