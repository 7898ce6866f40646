"""`analysis.cpp` in plain Python: what runs where no compiler is found, and what the tests hold the C++ against.

About a hundred times slower. Both cut a run without white space ("token soup") in the same four steps: prefixes and
suffixes come off one at a time until an abbreviation or a contraction appears or nothing comes off any more; a web
address is left whole; infixes part the rest; and letters of scripts without spaces stand alone.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arriero.curate import characters as ch
from arriero.curate.lexicon import CONTRACTING, UNITS, WHOLE
from arriero.curate.spans import (
    AFTER_SPACE,
    BLANK,
    ENDS_ELLIPSIS,
    ENDS_SENTENCE,
    ENDS_TERMINAL,
    HAS_LETTER,
    IS_SYMBOL,
    STARTS_BULLET,
    Spans,
    hash_points,
    hash_text,
)

Token = tuple[int, int]


class Scan(NamedTuple):
    """The arrays of an `Analysis`, as both twins return them."""

    words: Spans
    folded: NDArray[np.uint64]
    lines: Spans
    paragraphs: Spans
    alphanumeric: NDArray[np.int64]


def scan(texts: list[str], documents: NDArray[np.int64]) -> Scan:
    """Words, lines and paragraphs of each text; `documents` says where it begins in the batch."""
    words, lines, paragraphs = _Collector(), _Collector(), _Collector()
    folded: list[int] = []
    for text, at in zip(texts, documents.tolist(), strict=False):
        for start, end, kind in _words(text):
            words.add(text, at, start, end, kind)
            folded.append(_fold_hash(text[start:end]))
        for start, end in _between(r"\n", text, 0, len(text)):
            lines.add(text, at, start, end, _line_kind(text[start:end]))
        left = len(text) - len(text.lstrip())
        for start, end in _between(r"\n{2,}", text, left, max(left, len(text.rstrip()))):
            paragraphs.add(text, at, start, end, 0)
        for pieces in (words, lines, paragraphs):
            pieces.first.append(len(pieces.start))
    alphanumeric = np.array([sum(map(str.isalnum, text)) for text in texts], np.int64)
    return Scan(words.spans(), np.array(folded, np.uint64), lines.spans(), paragraphs.spans(), alphanumeric)


class _Collector:
    def __init__(self) -> None:
        self.start: list[int] = []
        self.length: list[int] = []
        self.hash: list[int] = []
        self.kind: list[int] = []
        self.first = [0]

    def add(self, text: str, at: int, start: int, end: int, kind: int) -> None:
        self.start.append(at + start)
        self.length.append(end - start)
        self.hash.append(hash_text(text[start:end]))
        self.kind.append(kind)

    def spans(self) -> Spans:
        return Spans(
            np.array(self.start, np.int64), np.array(self.length, np.int64), np.array(self.hash, np.uint64),
            np.array(self.kind, np.uint8), np.array(self.first, np.int64),
        )  # fmt: skip


def _between(separator: str, text: str, start: int, end: int) -> list[Token]:
    """The pieces that `separator` parts text[start:end] into."""
    pieces, last = [], start
    for match in re.compile(separator).finditer(text, start, end):
        pieces.append((last, match.start()))
        last = match.end()
    return [*pieces, (last, end)]


def _line_kind(line: str) -> int:
    stripped = line.strip()
    return (
        BLANK * (not stripped)
        | ENDS_TERMINAL * _is(line[-1:], ch.TERMINAL)
        | STARTS_BULLET * stripped.startswith(("•", "-"))
        | ENDS_ELLIPSIS * stripped.endswith(("...", "…"))
    )


# ---- characters


@functools.cache
def _bits(character: str) -> int:
    return int(ch.classes()[min(ord(character), ch.LIMIT - 1)])


def _is(character: str, bit: int) -> bool:
    """Whether there is a character and it has one of the bits."""
    return bool(character and _bits(character) & bit)


def fold(text: str) -> str:
    """Lower case, no accents, no punctuation, each run of digits one "0"."""
    table = ch.fold()
    points = [int(table[ord(c)]) if ord(c) < ch.LIMIT else 0 for c in text]
    digits = [_is(c, ch.DIGIT) for c in text]
    kept = [i for i, point in enumerate(points) if point]
    return "".join(chr(points[i]) for n, i in enumerate(kept) if not (n and digits[i] and digits[kept[n - 1]]))


def _fold_hash(word: str) -> int:
    folded = fold(word)
    return hash_points(map(ord, folded)) if folded else 0


# ---- words


def _words(text: str) -> list[tuple[int, int, int]]:
    """(start, end, kind) of each word."""
    words = []
    for run in re.finditer(r"\S+", text):
        tokens = _cut(run[0])
        for number, (start, end) in enumerate(tokens):
            word = run[0][start:end]
            kind = (
                HAS_LETTER * any(map(str.isalpha, word))
                | IS_SYMBOL * all(_is(c, ch.SYMBOL) for c in word)
                | AFTER_SPACE * (number == 0)
                | ENDS_SENTENCE * (len(word) == 1 and _is(word, ch.TERMINAL))
            )
            words.append((run.start() + start, run.start() + end, kind))
    return words


def _cut(s: str) -> list[Token]:
    """The tokens of a run without white space."""
    tokens: list[Token] = []
    tails: list[Token] = []
    start, end = 0, len(s)
    while start < end and not _special(s[start:end]):
        if length := _prefix(s[start:end]):
            tokens.append((start, start + length))
            start += length
        elif length := _suffix(s[start:end]):
            tails.append((end - length, end))
            end -= length
        else:
            break
    if start < end:
        rest = s[start:end]
        if cut := _special(rest):
            inner = [(0, cut), (cut, len(rest))] if cut < len(rest) else [(0, cut)]
        elif _is_address(rest):
            inner = [(0, len(rest))]
        else:
            inner = [token for a, b in _infixes(rest) for token in _letters_alone(rest, a, b)]
        tokens += [(start + a, start + b) for a, b in inner]
    return tokens + tails[::-1]


def _special(s: str) -> int:
    """Where to cut what stays whole (at its end) or a contraction; 0 for anything else."""
    if s in WHOLE or (len(s) == 2 and s[1] == "." and _is(s[0], ch.LOWER) and not _is(s[0], ch.UPPER)):
        return len(s)
    if s in ("cannot", "Cannot"):
        return 3
    at = len(s) - 2 if _is(s[-2:-1], ch.APOSTROPHE) else len(s) - 3
    if at < 1 or not _is(s[at], ch.APOSTROPHE):
        return 0
    tail = s[at + 1 :].lower() if s[at + 1 :].isascii() else ""
    if tail == "t" and at >= 2 and s[at - 1] in "nN" and _is(s[at - 2], ch.ALPHA):
        return at - 1
    return at if tail in ("d", "ll", "m", "re", "ve") and fold(s[:at]) in CONTRACTING else 0


def _dots(s: str) -> int:
    return len(s) - len(s.lstrip("."))


def _prefix(s: str) -> int:
    """Length of what comes off the beginning; 0 for nothing."""
    if s.startswith("''"):
        return 2
    if _is(s[0], ch.PREFIX):
        return 0 if s[0] == "+" and _is(s[1:2], ch.DIGIT) else 1
    dots = _dots(s)
    return dots if dots > 1 else 0


def _suffix(s: str) -> int:
    """Length of what comes off the end; 0 for nothing."""
    last, before = s[-1], s[-2:-1]
    if _is(last, ch.SUFFIX):
        return 2 if s.endswith("''") else 1
    if last in "sS" and _is(before, ch.APOSTROPHE):
        return 2
    if last == ".":
        dots = _dots(s[::-1])
        if dots > 1:
            return dots
        two_capitals = _is(before, ch.UPPER) and _is(s[-3:-2], ch.UPPER)
        return int(bool(before) and (_is(before, ch.DIGIT | ch.LOWER | ch.SUFFIX) or before in "%²-+" or two_capitals))
    if (last == "+" or _is(last, ch.CURRENCY)) and _is(before, ch.DIGIT):
        return 1
    return _unit(s)


def _unit(s: str) -> int:
    """Length of a unit that ends a number."""
    length = 0
    while length < min(len(s), 4) and not _is(s[len(s) - length - 1], ch.DIGIT):
        length += 1
    return length if 0 < length < len(s) and _is(s[-length - 1], ch.DIGIT) and s[-length:] in UNITS else 0


def _is_address(s: str) -> bool:
    """A web address, or a host with a path: www.x, scheme://x, host.tld/path."""
    if s.startswith("www."):
        return True
    slash = s.find("/")
    if slash < 1 or slash + 1 >= len(s):
        return False
    if s[slash - 1] == ":" and s[slash + 1] == "/":
        return slash > 1 and all(_is(c, ch.ALPHA) for c in s[: slash - 1])
    dot = s.rfind(".", 0, slash)
    return dot > 0 and slash - dot > 2 and all(_is(c, ch.ALPHA) for c in s[dot + 1 : slash])


def _infixes(s: str) -> list[Token]:
    """A token parted at its infixes, which are tokens themselves."""
    tokens, last, i = [], 0, 1
    while i < len(s):
        if length := _infix(s, i):
            tokens += [(last, i), (i, i + length)]
            last = i = i + length
        else:
            i += 1
    return [(a, b) for a, b in [*tokens, (last, len(s))] if a < b]


def _infix(s: str, i: int) -> int:
    """Length of the infix at i; 0 for none."""
    c, before, after = s[i], s[i - 1], s[i + 1 : i + 2]
    if _is(c, ch.ICON):
        return 1
    if c == ".":
        dots = _dots(s[i:])
        if dots > 1:
            return dots
        return int(_is(before, ch.LOWER | ch.QUOTE) and _is(after, ch.UPPER | ch.QUOTE))
    if c in "+-*^" and _is(before, ch.DIGIT) and (_is(after, ch.DIGIT) or after == "-"):
        return 1
    if c == ",":
        return int(_is(before, ch.ALPHA) and _is(after, ch.ALPHA))
    if _is(c, ch.HYPHEN):
        end = i
        while end < len(s) and _is(s[end], ch.HYPHEN):
            end += 1
        return end - i if _is(before, ch.ALPHA | ch.DIGIT) and _is(s[end : end + 1], ch.ALPHA) else 0
    return int(c in ":<>=/" and _is(before, ch.ALPHA | ch.DIGIT) and _is(after, ch.ALPHA))


def _letters_alone(s: str, start: int, end: int) -> list[Token]:
    """Each letter of a script without spaces apart from its neighbours."""
    cuts = [
        i
        for i in range(start + 1, end)
        if _is(s[i], ch.UNSPACED) or (_is(s[i - 1], ch.UNSPACED) and _is(s[i], ch.ALNUM | ch.SYMBOL))
    ]
    return list(zip([start, *cuts], [*cuts, end], strict=True))
