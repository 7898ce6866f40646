"""Gopher's rules (Rae et al. 2021, arXiv 2112.11446, appendix A1.1 and table A1), as MassiveText was filtered.

Where the paper is silent, they count as datatrove does: a token of punctuation or symbols alone is no word, but
stands in the denominator of the shares; n-grams are of tokens and their characters are compared with those of the
whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from arriero.curate.analysis import Analysis
from arriero.curate.ngrams import duplicate_ngrams, top_ngram
from arriero.curate.rules.verdict import Check, check_bounds, ratio, verdicts
from arriero.curate.spans import ENDS_ELLIPSIS, HAS_LETTER, IS_SYMBOL, STARTS_BULLET, hash_text
from arriero.errors import ConfigError


@dataclass(frozen=True)
class GopherQuality:
    """Drop what does not look like prose: too short or long, odd words, too many symbols, bullets or ellipses.

    Costs about 4 microseconds for each thousand characters.
    """

    name: ClassVar[str] = "gopher-quality"

    min_words: int = 50
    """Fewest words of a document."""
    max_words: int = 100_000
    """Most words of a document."""
    min_mean_word_length: float = 3.0
    """Least mean length of a word, characters."""
    max_mean_word_length: float = 10.0
    """Greatest mean length of a word, characters."""
    max_symbol_ratio: float = 0.1
    """Most hash signs for each token, and most ellipses (... or …) for each token."""
    max_bullet_lines: float = 0.9
    """Greatest share of lines that start with a bullet (• or -)."""
    max_ellipsis_lines: float = 0.3
    """Greatest share of lines that end in an ellipsis."""
    min_alpha_words: float = 0.8
    """Least share of tokens with an alphabetic character."""
    min_stop_words: int = 2
    """How many different stop words must occur at least."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """The stop words, as they are spelled; give those of your language, or set min_stop_words to 0."""

    def __post_init__(self) -> None:
        check_bounds(self, 0, 1, "max_symbol_ratio", "max_bullet_lines", "max_ellipsis_lines", "min_alpha_words")
        check_bounds(self, 0, len(self.stop_words), "min_stop_words")
        low, high = self.min_words, self.max_words
        if low > high:
            raise ConfigError(f"gopher_quality.min_words is {low}, more than max_words, {high}: it would drop all")

    def judge(self, analysis: Analysis) -> list[str | None]:
        """For each document, None to keep it or the reason to drop it."""
        words, lines = analysis.words, analysis.lines
        proper = ~words.having(IS_SYMBOL)
        n_words, n_tokens = words.per_document(proper), words.count
        # as `splitlines` counts: no line after the last line break
        n_lines = lines.count - (lines.length[lines.first[1:] - 1] == 0)
        hashes = np.array([text.count("#") for text in analysis.texts])
        ellipses = np.array([text.count("...") + text.count("…") for text in analysis.texts])
        mean_length = ratio(words.per_document(words.length * proper), n_words)
        return verdicts(
            [
                Check("words", n_words, "<", self.min_words),
                Check("words", n_words, ">", self.max_words),
                Check("mean_word_length", mean_length, "<", self.min_mean_word_length),
                Check("mean_word_length", mean_length, ">", self.max_mean_word_length),
                Check("hash_ratio", ratio(hashes, n_tokens), ">", self.max_symbol_ratio),
                Check("ellipsis_ratio", ratio(ellipses, n_tokens), ">", self.max_symbol_ratio),
                Check(
                    "bullet_lines", ratio(lines.per_document(lines.having(STARTS_BULLET)), n_lines), ">",
                    self.max_bullet_lines,
                ),
                Check(
                    "ellipsis_lines", ratio(lines.per_document(lines.having(ENDS_ELLIPSIS)), n_lines), ">",
                    self.max_ellipsis_lines,
                ),
                Check(
                    "alpha_words", ratio(words.per_document(words.having(HAS_LETTER)), n_tokens), "<",
                    self.min_alpha_words,
                ),
                Check("stop_words", self._stop_words(analysis), "<", self.min_stop_words),
            ]
        )  # fmt: skip

    def _stop_words(self, analysis: Analysis) -> np.ndarray:
        """How many of the stop words occur in each document, [D]."""
        words = analysis.words
        hashes = [np.uint64(hash_text(word)) for word in self.stop_words]
        which = np.flatnonzero(np.isin(words.hash, np.array(hashes, np.uint64)))  # few, so that eight passes are short
        document, hash_ = words.document[which], words.hash[which]
        found = np.zeros(len(analysis), np.int64)
        for one in hashes:
            found[np.unique(document[hash_ == one])] += 1
        return found


@dataclass(frozen=True)
class GopherRepetition:
    """Drop what repeats itself: lines, paragraphs, one frequent n-gram, or longer n-grams.

    Costs about 11 microseconds for each thousand characters (ngrams.py), more where much repeats.
    """

    name: ClassVar[str] = "gopher-repetition"

    max_dup_line_frac: float = 0.30
    """Greatest share of lines that occur earlier in the document."""
    max_dup_para_frac: float = 0.30
    """Greatest share of paragraphs that occur earlier in the document."""
    max_dup_line_char_frac: float = 0.20
    """Greatest share of characters in such lines."""
    max_dup_para_char_frac: float = 0.20
    """Greatest share of characters in such paragraphs."""
    max_top_ngram: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Greatest share of characters in the most frequent n-gram, for n = 2, 3, ..."""
    max_dup_ngram: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Greatest share of characters in n-grams that occur earlier, for n = 5, 6, ..."""

    def __post_init__(self) -> None:
        check_bounds(
            self, 0, 1, "max_dup_line_frac", "max_dup_para_frac", "max_dup_line_char_frac", "max_dup_para_char_frac",
            "max_top_ngram", "max_dup_ngram",
        )  # fmt: skip

    def judge(self, analysis: Analysis) -> list[str | None]:
        """For each document, None to keep it or the reason to drop it."""
        words, lines, paragraphs, whole = analysis.words, analysis.lines, analysis.paragraphs, analysis.characters
        para_again = paragraphs.repeated
        line_again = lines.repeated & (lines.length > 0)
        # lines are parted by runs of line breaks: of the empty ones only the first and the last in a text count
        leading, trailing = lines.length[lines.first[:-1]] == 0, lines.length[lines.first[1:] - 1] == 0
        n_lines = lines.per_document(lines.length > 0) + leading + trailing
        n_line_again = lines.per_document(line_again) + (leading & trailing)
        checks = [
            Check("characters", whole, "<", 1),
            Check(
                "dup_para_frac", ratio(paragraphs.per_document(para_again), paragraphs.count), ">",
                self.max_dup_para_frac,
            ),
            Check(
                "dup_para_char_frac", ratio(paragraphs.per_document(paragraphs.length * para_again), whole), ">",
                self.max_dup_para_char_frac,
            ),
            Check("dup_line_frac", ratio(n_line_again, n_lines), ">", self.max_dup_line_frac),
            Check(
                "dup_line_char_frac", ratio(lines.per_document(lines.length * line_again), whole), ">",
                self.max_dup_line_char_frac,
            ),
        ]  # fmt: skip
        for label, count, smallest, bounds in (
            ("top_{}gram_char_frac", top_ngram, 2, self.max_top_ngram),
            ("dup_{}gram_char_frac", duplicate_ngrams, 5, self.max_dup_ngram),
        ):
            sizes = tuple(range(smallest, smallest + len(bounds)))
            shares = count(words.hash, words.length, words.first, sizes)
            checks += [
                Check(label.format(n), ratio(shares[:, i], whole), ">", bound)
                for i, (n, bound) in enumerate(zip(sizes, bounds, strict=True))
            ]
        return verdicts(checks)
