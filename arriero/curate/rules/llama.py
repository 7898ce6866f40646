"""Rules that Llama 1 and Llama 3 describe without thresholds; ours were measured, as noted where they are set.

Sources: Llama 3 (Dubey et al. 2024, arXiv 2407.21783, section 3.1.1): duplicated n-gram coverage of lines, dirty words,
token distributions far from the corpus'. Llama 1 (Touvron et al. 2023, arXiv 2302.13971, section 2.1): line length and
alphanumeric share of source code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from arriero.curate.analysis import Analysis, analyse
from arriero.curate.ngrams import ngram_coverage
from arriero.curate.rules.verdict import Check, check_bounds, ratio, verdicts
from arriero.curate.spans import IS_SYMBOL, MULTIPLIER


@dataclass(frozen=True)
class NgramCoverage:
    """Remove lines that consist of repeated content, such as logs and error messages; drop what has no lines left.

    Such lines may be long and unique, so that line deduplication cannot see them. The measure is Gopher's (Rae et al.
    2021): the share of a line's characters, white space aside, in n-grams that occur more than once in it. Thresholds
    are ours. Costs about 3 microseconds for each thousand characters.
    """

    name: ClassVar[str] = "ngram-coverage"

    ngram: int = 5
    """Words in an n-gram."""
    max_coverage: float = 0.7
    """Greatest share of a line's characters in repeated n-grams. Of 20,456 lines of 20 words or more in speeches,
    plays, Wikipedia and school problems 2 lie above 0.7; above 0.5 lie 34, nearly all good sentences."""
    min_words: int = 20
    """Lines with fewer words, symbols aside, are left alone."""

    def __post_init__(self) -> None:
        check_bounds(self, 0, 1, "max_coverage")
        check_bounds(self, 2, 1000, "ngram")

    def edit(self, analysis: Analysis) -> list[tuple[str, str | None]]:
        """For each document its text without such lines, and None to keep it or the reason to drop it."""
        words, lines, bounds = analysis.words, analysis.lines, analysis.line_words
        covered = ngram_coverage(words.hash, words.length, bounds, (self.ngram,))[:, 0]
        letters = np.append(0, np.cumsum(words.length))
        share = ratio(covered, letters[bounds[1:]] - letters[bounds[:-1]])
        proper = np.append(0, np.cumsum(~words.having(IS_SYMBOL)))  # a ruled line of 70 "=" is no line of words
        bad = (share > self.max_coverage) & (proper[bounds[1:]] - proper[bounds[:-1]] >= self.min_words)
        results: list[tuple[str, str | None]] = [(text, None) for text in analysis.texts]
        for document in np.unique(lines.document[bad]).tolist():
            which = slice(int(lines.first[document]), int(lines.first[document + 1]))
            pieces = analysis.texts[document].split("\n")
            text = "\n".join(piece for piece, out in zip(pieces, bad[which], strict=True) if not out)
            reason = f"repeated n-grams cover {share[which].max():.2f} of all its lines" if not text.strip() else None
            results[document] = (text, reason)
        return results


@dataclass(frozen=True)
class DirtyWords:
    """Drop documents with many words of a list that you give, such as words of adult pages.

    Words are compared in lower case, without accents and punctuation; an entry may be several words. With both bounds
    0 one occurrence is enough, as in C4. Costs about 1 microsecond for each thousand characters.
    """

    name: ClassVar[str] = "dirty-words"

    words: tuple[str, ...] = ()
    """The words and phrases."""
    max_count: int = 2
    """Most occurrences in a document, counted one by one."""
    max_share: float = 0.005
    """Most occurrences for each word of a document; it is dropped where both bounds are passed."""

    def __post_init__(self) -> None:
        check_bounds(self, 0, 1, "max_share")

    def judge(self, analysis: Analysis) -> list[str | None]:
        """For each document, None to keep it or the reason to drop it."""
        words, first = analysis.content
        count = np.zeros(len(analysis), np.int64)
        for size, hashes in _phrases(self.words).items():
            found = np.isin(_ngram_hashes(words, size), hashes)
            total = np.append(0, np.cumsum(found))
            last = np.maximum(first[1:] - size + 1, first[:-1])  # no phrase runs on into the next document
            count += total[np.minimum(last, len(found))] - total[np.minimum(first[:-1], len(found))]
        often = ratio(count, np.diff(first)) > self.max_share
        return verdicts([Check("dirty_words", count * often, ">", self.max_count)])


@functools.cache
def _phrases(phrases: tuple[str, ...]) -> dict[int, NDArray[np.uint64]]:
    """Number of words -> hashes of the phrases of so many."""
    words, first = analyse(list(phrases)).content
    by_size: dict[int, list[int]] = {}
    for start, end in pairwise(first.tolist()):
        if start < end:
            by_size.setdefault(end - start, []).append(int(_ngram_hashes(words[start:end], end - start)[0]))
    return {size: np.array(hashes, np.uint64) for size, hashes in by_size.items()}


def _ngram_hashes(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    hashes = np.zeros(max(len(words) - size + 1, 0), np.uint64)
    for i in range(size):
        hashes = hashes * np.uint64(MULTIPLIER) ^ words[i : i + len(hashes)]
    return hashes


@dataclass(frozen=True)
class CodeRules:
    """Drop source files that are not written by people: minified or generated lines, data, encoded binary.

    The bounds are those of Codex (Chen et al. 2021, arXiv 2107.03374, section 3.1) for lines, and of RedPajama's
    reproduction of Llama 1's data for the alphanumeric share; Llama 1 names the rules only. The cost is negligible.
    """

    name: ClassVar[str] = "code"

    max_mean_line: float = 100.0
    """Greatest mean length of a line, characters."""
    max_line: int = 1000
    """Length of the longest line, characters."""
    min_alphanumeric: float = 0.25
    """Least share of letters and digits among all characters."""

    def __post_init__(self) -> None:
        check_bounds(self, 0, 1, "min_alphanumeric")

    def judge(self, analysis: Analysis) -> list[str | None]:
        """For each document, None to keep it or the reason to drop it."""
        lines, whole = analysis.lines, analysis.characters
        longest = np.maximum.reduceat(lines.length, lines.first[:-1]) if len(analysis) else np.empty(0, np.int64)
        return verdicts(
            [
                Check("characters", whole, "<", 1),
                Check("mean_line", ratio(lines.per_document(lines.length), lines.count), ">", self.max_mean_line),
                Check("line", longest, ">", self.max_line),
                Check("alphanumeric", ratio(analysis.alphanumeric, whole), "<", self.min_alphanumeric),
            ]
        )


@dataclass(frozen=True)
class TokenOutlier:
    """Drop documents whose words are spread very differently from the corpus': tables of numbers, keys, noise.

    Words are counted in 2**20 buckets of their hash. For a document with counts n_i and N words, and corpus shares
    q_i, the divergence is KL = sum (n_i / N) log2((n_i / N) / q_i), in bits. Needs the corpus' counts first: sum
    `count` over any large sample of it, and give them to `judge`. Costs about 3 microseconds for each thousand
    characters.
    """

    name: ClassVar[str] = "token-outlier"

    max_divergence: float = 10.0
    """Greatest divergence, bits. On 6,000 documents of prose, manuals and code: median 4 to 6, random letters 12."""
    min_words: int = 50
    """Documents with fewer words are left alone: so few are far from any distribution."""

    def __post_init__(self) -> None:
        check_bounds(self, 0, 64, "max_divergence")

    def count(self, analysis: Analysis) -> NDArray[np.int64]:
        """Words of a batch by bucket, int64 [2**20]; the sum over batches is the corpus distribution."""
        return np.bincount(_buckets(analysis), minlength=1 << BUCKET_BITS)

    def judge(self, analysis: Analysis, corpus: NDArray[np.int64]) -> list[str | None]:
        """For each document, None to keep it or the reason to drop it. corpus: the sum of `count`."""
        enough = np.diff(analysis.content[1]) >= self.min_words
        return verdicts([Check("divergence", self.divergence(analysis, corpus) * enough, ">", self.max_divergence)])

    def divergence(self, analysis: Analysis, corpus: NDArray[np.int64]) -> NDArray[np.float64]:
        """KL of each document, bits, [D]; 0 for one without words. Corpus counts are smoothed by one."""
        first = analysis.content[1]
        words = np.diff(first)
        document = np.repeat(np.arange(len(analysis)), words)
        cells, counts = np.unique((document << BUCKET_BITS) | _buckets(analysis), return_counts=True)
        document, bucket = cells >> BUCKET_BITS, cells & ((1 << BUCKET_BITS) - 1)
        share = counts / words[document]
        expected = (corpus[bucket] + 1) / (corpus.sum() + len(corpus))
        terms = share * np.log2(share / expected)
        return np.bincount(document, terms, minlength=len(analysis)).astype(np.float64)


BUCKET_BITS = 20


def _buckets(analysis: Analysis) -> NDArray[np.int64]:
    return (analysis.content[0] >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
