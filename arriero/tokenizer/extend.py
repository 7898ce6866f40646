"""Grows a byte-level vocabulary from new text, as Llama 3's grew from 32K to 128K; existing ids keep their meaning.

New merges are learned on top of the base's: text is encoded with the base tokenizer, and byte-pair encoding continues
on its tokens, within the same words. In the grown tokenizer the new merges rank after all of the base's, so they apply
exactly where they were learned, and a text in which no new token fits keeps its ids. New ids follow all old ones,
special tokens included; `parts` lists the base tokens that each stands for, from which a model's new rows are computed
(checkpoint/resize.py).

The learner is that of `tokenizers`, over an alphabet of base tokens: id i is written as the character U+10000 + i, so
that a word of base tokens is a word of characters. rustbpe is four times as fast, but can only start from bytes.

Price: splitting text into words at 2 MB/s; the sample in memory once more, as characters, and the learner's counts of
distinct words. The result is a tokenizer.json; Llama 3's own file format cannot hold it, since there special tokens
come right after the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from arriero.errors import CheckpointError, DataError
from arriero.tokenizer.base import Tokenizer, utf8
from arriero.tokenizer.hf import HfTokenizer, byte_level_bytes, merges_into
from arriero.tokenizer.llama3 import TiktokenTokenizer

_FIRST_LETTER = 0x10000  # from here on no code point is whitespace, and none is a surrogate
_MAX_IDS = 0x110000 - _FIRST_LETTER
_MIN_COUNT = 2  # a merge seen once does not generalise to other text
_SPARE = 1.05  # a few merges spell a token that another has spelled


@dataclass(frozen=True)
class Extension:
    """The grown tokenizer, and for each new id the base's ids for the same bytes."""

    tokenizer: HfTokenizer
    parts: Mapping[int, list[int]]


def extend(base: Tokenizer, texts: Iterable[str], n_new: int) -> Extension:
    """Learn `n_new` tokens from texts on top of `base`, a byte-level BPE tokenizer.

    Raises CheckpointError for another kind of base, and DataError where the texts have not so many merges in them
    (seen at least twice).
    """
    backend = backend_of(base)
    words = _Words(backend)
    merged = _learn(words, texts, n_new)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    new: list[str] = []  # in byte-level spelling
    known = set(vocabulary)
    for letters in merged:
        spelled = "".join(map(words.spelling, letters))
        if spelled not in known and len(new) < n_new:
            known.add(spelled)
            new.append(spelled)
    if len(new) < n_new:
        raise DataError(
            f"the text holds only {len(new):,} new tokens that occur at least twice, {n_new:,} are asked for; give "
            "more text, or ask for fewer"
        )
    first = base.vocab_size
    tokenizer = HfTokenizer(_grown(backend, vocabulary, new, first), base.special, base.chat_template)
    parts = {first + k: [token.id for token in backend.model.tokenize(spelled)] for k, spelled in enumerate(new)}
    assert all(b"".join(map(base.token_bytes, ids)) == byte_level_bytes(new[i - first]) for i, ids in parts.items())
    return Extension(tokenizer, parts)


def backend_of(base: Tokenizer) -> Backend:
    """Return the `tokenizers` pipeline of a byte-level tokenizer. Raises CheckpointError for any other."""
    if isinstance(base, TiktokenTokenizer):
        return base.to_backend()
    if not isinstance(base, HfTokenizer) or not base.byte_level or base.backend.normalizer is not None:
        raise CheckpointError(
            "only byte-level BPE (Llama 3, SmolLM2: tokenizer.json or tiktoken's format) can be extended, this "
            "tokenizer is of another kind; train a new one on both texts: arriero tokenizer train"
        )
    return base.backend


class _Words:
    """Words as the base splits and encodes them, a letter for each token."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._letters: dict[str, str] = {}
        self.alphabet: set[str] = set()

    def of(self, text: str) -> Iterator[str]:
        """Yield the words that are more than one token: only these have anything to merge."""
        for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text):
            letters = self._letters.get(word)
            if letters is None:
                ids = [token.id for token in self._backend.model.tokenize(word)]
                letters = self._letters[word] = "".join(chr(_FIRST_LETTER + i) for i in ids) if len(ids) > 1 else ""
                self.alphabet.update(letters)
            if letters:
                yield letters

    def spelling(self, letter: str) -> str:
        return str(self._backend.id_to_token(ord(letter) - _FIRST_LETTER))


def _learn(words: _Words, texts: Iterable[str], n_new: int) -> list[str]:
    """Return what the merges make, in order, as letters: somewhat more than `n_new` where the text has them."""
    lines = [" ".join(words.of(utf8(text).decode())) for text in texts]
    n_new = min(n_new, sum(map(len, lines)))  # each merge joins a letter at least
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(words.alphabet) + int(n_new * _SPARE) + 64, min_frequency=_MIN_COUNT, show_progress=False
    )
    learner.train_from_iterator(lines, trainer, length=len(lines))
    merges = json.loads(learner.to_str())["model"]["merges"]
    return ["".join(merge) for merge in merges]


def _grown(backend: Backend, vocabulary: Mapping[str, int], new: list[str], first: int) -> Backend:
    state: dict[str, Any] = json.loads(backend.to_str())
    model = state["model"]
    ids = dict(vocabulary)
    if first + len(new) > _MAX_IDS:
        raise CheckpointError(f"{first + len(new):,} ids are too many; the limit is {_MAX_IDS:,}")
    for k, spelled in enumerate(new):
        # Every pair that joins to the token makes it, as in Llama 3's format, not only the pair that was learned.
        model["merges"] += map(list, merges_into(spelled, ids))
        ids[spelled] = first + k
    # Special tokens are listed in the vocabulary as well, else the library would move them behind the new ids.
    model["vocab"] = ids
    return Backend.from_str(json.dumps(state))
