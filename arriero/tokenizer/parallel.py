"""Encodes many documents to one flat array of ids, as fast as is possible with exact ids; used by `arriero shard`.

The library that defines a format decides the ids (`Tokenizer.encode_batch`): 15 MB of text a second and core for Llama
3's vocabulary, 2 for a tokenizer.json, 5 for SentencePiece. gigatoken (extra `data`) gives the same ids nine to forty
times faster, by a hand-written splitter and a cache of words. It is used wherever it proves equal: on a list of hard
texts when the encoder is made, and on one document in a thousand while it runs. Where it does not support a pipeline,
or is not installed, the defining library encodes; the ids are the same either way.

Price: building gigatoken's tables takes half a second for 128K tokens, and as long again to state the pipeline. Its
cache takes about 85 bytes per distinct word and never shrinks (5 GB after 540 MB of random words), so the tables are
rebuilt when the process has grown by `MAX_GROWTH`.
"""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from arriero.errors import CheckpointError, UserError
from arriero.tokenizer.base import Tokenizer, utf8
from arriero.tokenizer.hf import HfTokenizer, byte_level_alphabet
from arriero.tokenizer.llama3 import TiktokenTokenizer
from arriero.tokenizer.sentencepiece import SentencePieceTokenizer

Engine = Literal["auto", "exact"]

MAX_GROWTH = 1_000_000_000  # bytes of memory since the tables were built
MIN_TEXT = 100_000_000  # bytes of text between two builds at least: others may be what grows
CHECK_EVERY = 1009  # documents; a prime, so that no period in the data hides from it

# Texts on which splitters and merge rules differ, if they differ at all.
_HARD = [
    *["", " ", "  ", "\n", " \n ", "\r\n\r\n", "\t\tx", "a\u00a0b\u3000c\u0085d\u2028e", "\x00\x01\x04\x7f"],
    *["I'LL don't we'Ve 'ſ ſ's", "K İi ǅ ﬁ e\u0301", "naïve café", "x" * 300],
    *["日本語テキスト 한국어 ไทย हिन्दी العربية"],
    *["0 12 345 6789 1234567 3.14 1,000 ٣٤٥ ²³ ½ Ⅷ", "a1b22c333", "\u200d\ufeff\u202e", "�"],
    *["👩‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️‍🔥 👍🏽", "def f(x):\n\treturn  x**2  # no\n\n\nclass A:\n    pass\n"],
    *["<s></s><unk><0x0A>▁Ġ<|eot_id|><|im_end|><|begin_of_text|>", "...!!!???---===", "(((a)))[[b]]{{c}}", " !? ,; "],
    *["https://a.b/c?d=e&f#g", "  leading and trailing  ", "MiXeD CaSe WORDS", "\u1e9e\u0130\u017f", "a\n b\n  c\n"],
]


@dataclass(frozen=True)
class Encoded:
    """n documents as ids: document i is ids[offsets[i] : offsets[i + 1]]; ids is uint32, offsets int64 [n + 1]."""

    ids: NDArray[np.uint32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> NDArray[np.uint32]:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


class DocumentEncoder:
    """Encodes batches of documents into flat arrays, each as `Tokenizer.encode` does, by the fastest equal engine.

    parallel: whether gigatoken uses every core; not in a process that is one of many. engine: "exact" is the slow
    twin, the library that defines the format. A copy in a worker process builds its own tables.
    """

    def __init__(self, tokenizer: Tokenizer, *, parallel: bool = True, engine: Engine = "auto") -> None:
        self.tokenizer = tokenizer
        self.parallel = parallel
        self._fast = _Gigatoken.build(tokenizer, parallel) if engine == "auto" else None
        self._n_documents = 0

    @property
    def engine(self) -> str:
        """Who encodes: "gigatoken", or "exact" for the defining library."""
        return "exact" if self._fast is None else "gigatoken"

    def encode(self, texts: Sequence[str], *, before: int | None = None, after: int | None = None) -> Encoded:
        """Encode texts, each between the ids `before` and `after`; special-token text in them stays plain text.

        Raises UserError if the fast engine is caught giving other ids than the defining library.
        """
        rows = self._exactly(texts) if self._fast is None else self._fast_rows(texts)
        self._n_documents += len(texts)
        return _joined(rows, before, after)

    def _exactly(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(ids, dtype=np.uint32) for ids in self.tokenizer.encode_batch(texts)]

    def _fast_rows(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        assert self._fast is not None
        rows = self._fast.encode(texts)
        doubtful = self._fast.doubtful(texts, rows)
        for i, row in zip(doubtful, self._exactly([texts[i] for i in doubtful]), strict=True):
            rows[i] = row
        for i in range(-self._n_documents % CHECK_EVERY, len(texts), CHECK_EVERY):
            if rows[i].tolist() != self.tokenizer.encode(texts[i]):
                raise UserError(
                    f"document {self._n_documents + i}, which begins {texts[i][:40]!r}: gigatoken gave other ids than "
                    "the tokenizer's own library; nothing that it wrote in this run is to be trusted: uninstall "
                    "gigatoken (or give engine='exact'), encode again, and report the document"
                )
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "parallel": self.parallel, "engine": "auto" if self._fast else "exact"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"], parallel=state["parallel"], engine=state["engine"])  # type: ignore[misc]


def _joined(rows: Sequence[NDArray[np.uint32]], before: int | None, after: int | None) -> Encoded:
    n_marks = sum(mark is not None for mark in (before, after))
    lengths = np.array([len(row) + n_marks for row in rows], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    plain = np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.uint32)
    if not n_marks:
        return Encoded(plain, offsets)
    ids, is_plain = np.empty(offsets[-1], dtype=np.uint32), np.ones(offsets[-1], dtype=bool)
    for mark, places in ((before, offsets[:-1]), (after, offsets[1:] - 1)):
        if mark is not None:
            ids[places], is_plain[places] = mark, False
    ids[is_plain] = plain
    return Encoded(ids, offsets)


class _Gigatoken:
    """gigatoken over one tokenizer's pipeline, without its special tokens."""

    def __init__(self, pipeline: dict[str, Any], tokenizer: Tokenizer, parallel: bool) -> None:
        self._digits = _take_digits(pipeline)
        _add_missing_bytes(pipeline, tokenizer.vocab_size)
        self._pipeline = json.dumps(pipeline)
        self._tokenizer = tokenizer
        self._parallel = parallel
        self._special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._special[list(tokenizer.special_ids.values())] = True
        self.spells_special = _spells_special(pipeline["model"], tokenizer)
        self._build()

    @classmethod
    def build(cls, tokenizer: Tokenizer, parallel: bool) -> _Gigatoken | None:
        """Return the engine if it is installed, knows this pipeline, and gives equal ids on the hard texts."""
        pipeline = _plain_pipeline(tokenizer)
        if pipeline is None:
            return None
        try:
            engine = cls(pipeline, tokenizer, parallel)
            rows = engine.encode(_HARD)
        except ImportError:
            return None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # what it does not know it refuses by an exception, or by a panic, which is no Exception
            return None
        doubtful = set(engine.doubtful(_HARD, rows))
        pairs = zip(rows, tokenizer.encode_batch(_HARD), strict=True)
        if any(row.tolist() != ids for i, (row, ids) in enumerate(pairs) if i not in doubtful):
            warnings.warn("gigatoken gives other ids for this tokenizer, so its own library encodes", stacklevel=4)
            return None
        return engine

    def doubtful(self, texts: Sequence[str], rows: Sequence[NDArray[np.uint32]]) -> list[int]:
        """Return the places of texts that the slow twin has to encode, all of them rare.

        Those with a byte that has no token; those where merges spelled a special token, which are encoded in parts;
        and, where the pipeline splits digits off, those with a digit beyond 0 to 9.
        """
        found = [i for i, row in enumerate(rows) if len(row) and row.max() >= len(self._special)]
        if self.spells_special:
            found += [i for i, row in enumerate(rows) if i not in found and self._special[row].any()]
        if self._digits is not None:
            known = set(found)
            found += [i for i, text in enumerate(texts) if i not in known and self._digits.beyond_ascii(text)]
        return found

    def _build(self) -> None:
        from gigatoken import gigatoken_rs

        self._backend: Any = None  # free the old one first
        self._backend = gigatoken_rs.load_hf_json(self._pipeline)
        self._n_bytes = 0
        self._memory = psutil.Process().memory_info().rss

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        parts = [self._tokenizer.parts_of(text) for text in texts]
        data = [utf8(part) for row in parts for part in row]
        if self._n_bytes > MIN_TEXT and psutil.Process().memory_info().rss > self._memory + MAX_GROWTH:
            self._build()
        self._n_bytes += sum(map(len, data))
        encoded = _rows(self._backend.encode_batch(data, parallel=self._parallel))
        return [_whole(encoded, len(row)) for row in parts]


def _rows(batch: Any) -> Iterator[NDArray[np.uint32]]:
    """Yield the rows of a batch, which is a list of arrays, or with the awkward package one ragged array."""
    if isinstance(batch, list):
        yield from batch
        return
    offsets, content = np.asarray(batch.layout.offsets.data), np.asarray(batch.layout.content.data)
    for i in range(len(offsets) - 1):
        yield content[offsets[i] : offsets[i + 1]]


def _whole(rows: Iterator[NDArray[np.uint32]], n_parts: int) -> NDArray[np.uint32]:
    return next(rows) if n_parts == 1 else np.concatenate([next(rows) for _ in range(n_parts)])


def _plain_pipeline(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the tokenizer.json that encodes plain text only, or None for one that has to parse tokens in it."""
    if not isinstance(tokenizer, (HfTokenizer, TiktokenTokenizer, SentencePieceTokenizer)):
        return None
    try:
        backend = tokenizer.backend if isinstance(tokenizer, HfTokenizer) else tokenizer.to_backend()
    except CheckpointError:  # a SentencePiece model that no tokenizer.json can state
        return None
    state: dict[str, Any] = json.loads(backend.to_str())
    if any(not added["special"] for added in state["added_tokens"]):
        return None
    return {**state, "added_tokens": [], "post_processor": None}


def _add_missing_bytes(pipeline: dict[str, Any], vocab_size: int) -> None:
    """Give bytes without a token (SmolLM2 lacks 21) a placeholder id from `vocab_size` on: gigatoken needs all 256."""
    if not pipeline["model"].get("byte_fallback"):
        vocabulary = pipeline["model"]["vocab"]
        missing = [letter for letter in byte_level_alphabet().values() if letter not in vocabulary]
        vocabulary.update({letter: vocab_size + k for k, letter in enumerate(missing)})


class _Digits:
    """Which characters beyond ASCII the `tokenizers` library takes for digits: asked of it, a character at a time."""

    def __init__(self) -> None:
        self._splitter = pre_tokenizers.Digits(individual_digits=True)
        self._seen: set[str] = set()
        self._digits: set[str] = set()

    def beyond_ascii(self, text: str) -> bool:
        if text.isascii():
            return False
        characters = {character for character in set(text) if not character.isascii()}
        for character in characters - self._seen:
            if len(self._splitter.pre_tokenize_str(f"a{utf8(character).decode()}a")) > 1:
                self._digits.add(character)
        self._seen |= characters
        return not self._digits.isdisjoint(characters)


def _take_digits(pipeline: dict[str, Any]) -> _Digits | None:
    """Rewrite "digits apart, then GPT-2's pattern" (SmolLM2), which gigatoken does not know, as what it does know.

    Text is split at added tokens before anything else, and each stretch between is split by itself, just as at digits;
    so the ten digits become added tokens. None where the pipeline is another.
    """
    steps = pipeline["pre_tokenizer"].get("pretokenizers", []) if pipeline["pre_tokenizer"] else []
    if [step["type"] for step in steps] != ["Digits", "ByteLevel"] or not steps[0]["individual_digits"]:
        return None
    vocabulary = pipeline["model"]["vocab"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    pipeline["added_tokens"] = [{"id": vocabulary[digit], "content": digit, **plain} for digit in string.digits]
    pipeline["pre_tokenizer"] = steps[1]
    return _Digits()


def _spells_special(model: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether plain text may come out as a special token: where one is a word of the vocabulary that merges make."""
    in_vocabulary = [text for text in tokenizer.special_ids if text in model["vocab"]]
    made = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]}
    return bool(in_vocabulary) and (bool(model.get("ignore_merges")) or not made.isdisjoint(in_vocabulary))
