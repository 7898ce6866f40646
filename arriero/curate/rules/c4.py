"""The rules of C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2), in the order of its published pipeline.

They edit: lines that are no sentence go, and a page is dropped for what is left, or for a curly bracket or "lorem
ipsum" in a line that would stay. The rule on long words is in the pipeline's code, not in the paper. C4's list of bad
words is `DirtyWords`; its removal of repeated spans of three sentences is not here.

Thresholds are those of the paper as printed (JMLR 21, 2020) and of that code. The paper's first version and datatrove,
and with it FineWeb, ask for lines of 3 words and pages of 5 sentences instead; datatrove lets a line end in ' too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from arriero.curate.analysis import Analysis
from arriero.curate.spans import AFTER_SPACE, ENDS_SENTENCE, IS_SYMBOL

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SUSPICIOUS = (*POLICY, "javascript", "lorem ipsum", "{")  # few documents have any


@dataclass(frozen=True)
class C4Rules:
    """Keep lines that are sentences, and pages with enough of them.

    Costs about 12 microseconds for each thousand characters, most of it slicing lines in Python.
    """

    name: ClassVar[str] = "c4"

    min_words: int = 5
    """Fewest words of a line, parted by white space; shorter lines are removed."""
    max_word_length: int = 1000
    """A line with a longer word, characters, is removed."""
    min_sentences: int = 3
    """Fewest sentences in the lines that stay; a document with fewer is dropped."""
    line_ends: tuple[str, ...] = (".", "?", "!", '"')
    """A line must end in one of these (and not in ...), or is removed; empty to keep all, as FineWeb does."""
    remove_citations: bool = True
    """Take out [1], [edit] and [citation needed]."""

    def edit(self, analysis: Analysis) -> list[tuple[str, str | None]]:
        """For each document its text with the lines that stay, and None to keep it or the reason to drop it."""
        lines = analysis.lines
        eligible = self._eligible(analysis)
        sentences = sentences_of_lines(analysis).tolist()
        starts = (lines.start - np.repeat(analysis.documents[:-1], lines.count)).tolist()
        ends = (np.array(starts, np.int64) + lines.length).tolist()
        results = []
        for document, text in enumerate(analysis.texts):
            first, last = int(lines.first[document]), int(lines.first[document + 1])
            numbers = (np.flatnonzero(eligible[first:last]) + first).tolist()
            results.append(self._edit(text, [(text[starts[n] : ends[n]], sentences[n]) for n in numbers]))
        return results

    def _eligible(self, analysis: Analysis) -> NDArray[np.bool_]:
        """Lines with enough words, none of them too long, bool [L]."""
        words, bounds = analysis.words, analysis.line_words
        begins = words.having(AFTER_SPACE)
        total = np.append(0, np.cumsum(begins))
        enough = total[bounds[1:]] - total[bounds[:-1]] >= self.min_words
        runs = np.flatnonzero(begins)
        if len(runs):
            last = np.append(runs[1:], len(begins)) - 1  # the last token of each run without white space
            long = words.start[last] + words.length[last] - words.start[runs] > self.max_word_length
            enough[np.searchsorted(analysis.lines.start, words.start[runs[long]], side="right") - 1] = False
        return enough

    def _edit(self, text: str, lines: list[tuple[str, int]]) -> tuple[str, str | None]:
        """The text of the lines that stay; `lines`: the eligible ones and their sentences."""
        suspicious = any(map(text.lower().__contains__, SUSPICIOUS))
        kept, total = [], 0
        for line, sentences in lines:
            line = line.strip()
            if self.remove_citations and "[" in line:
                line = CITATION.sub("", line)
            if self.line_ends and (not line.endswith(self.line_ends) or line.endswith("...")):
                continue
            if suspicious:
                low = line.lower()
                if "lorem ipsum" in low:
                    return text, "lorem ipsum"
                if "javascript" in low:
                    continue
                if "{" in low:
                    return text, "curly bracket"
                if any(p in low for p in POLICY):
                    continue
            kept.append(line)
            total += sentences
        if total < self.min_sentences:
            return "\n".join(kept).strip(), f"sentences {total} < {self.min_sentences}"
        return "\n".join(kept).strip(), None


def sentences_of_lines(analysis: Analysis) -> NDArray[np.int64]:
    """How many sentences begin in each line, int64 [L]; 0 for a blank one.

    A sentence begins with a line, and with each word that has a token . ! ? (or its like) since the word before it: the
    full stop of an abbreviation is part of its token and ends none.
    """
    words, bounds = analysis.words, analysis.line_words
    ended = np.append(0, np.cumsum(words.having(ENDS_SENTENCE)))  # up to each token
    proper = np.flatnonzero(~words.having(IS_SYMBOL))
    line = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))[proper]
    before = np.empty_like(proper)  # the word before, or the beginning of the line
    if len(proper):
        before[0], before[1:] = bounds[line[0]], proper[:-1]
        before = np.maximum(before, bounds[line])
    begins = np.zeros(len(words.start) + 1, np.int64)
    begins[proper + 1] = ended[proper] > ended[before]
    total = np.cumsum(begins)
    return (total[bounds[1:]] - total[bounds[:-1]]) + (np.diff(bounds) > 0)
