"""The interface of all tokenizer families, and the code that they share.

There are two ways to encode a text. `encode` is for text that a person wrote: the characters "<|eot_id|>" in it are
encoded as plain text. `encode_rendered` is for the output of a chat template, where the same characters are the special
token. Added tokens that are not special are words of the vocabulary and recognised by both, as in transformers; those
of them that end generation are kept out of a conversation's messages too (chat.py), or a user's text could end an
answer.
Splitting at special tokens, decoding, streaming and the fingerprint are implemented here; a family (`hf.py`,
`llama3.py`, `sentencepiece.py`) only turns plain segments into ids and ids into bytes, through the library that defines
its format. Broken surrogates are treated as tiktoken treats them: halves of a pair are joined, a lone half becomes
U+FFFD.

Price: splitting costs one pass of a compiled regular expression, about 1% of the encoding itself.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from arriero.errors import CheckpointError

if TYPE_CHECKING:
    from arriero.tokenizer.template import ChatTemplate

# Added tokens that end a turn or a text in the families that people run as Llamas; llama.cpp keeps a like list.
END_TOKENS = frozenset(
    ["</s>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"]
)

ROLES = ("bos", "eos", "pad", "unk")

# Where a family puts its "dummy prefix" space: nowhere (byte-level BPE), at the start of a text only, or at the start
# and after every special token (Meta's and llama.cpp's SentencePiece).
PrefixRule = Literal["never", "first", "always"]


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens added to a vocabulary, as the tokenizer's files declare them.

    ids: every special token, by its text. words: added tokens that are not special, by their text. bos, eos, pad, unk:
    the texts of those that have a role. stops: ids that end a text according to the files, special or not.
    adds_bos: whether the family's own `encode` puts `bos` before a text.
    """

    ids: Mapping[str, int]
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    stops: frozenset[int] = frozenset()
    adds_bos: bool = False
    words: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in ("bos", "eos", "pad"):
            text = getattr(self, role)
            if text is not None and self.id_of(text) is None:
                raise CheckpointError(
                    f"the tokenizer names {text!r} as its {role} token, but no special token has that text; "
                    "check tokenizer_config.json or the GGUF metadata against the vocabulary"
                )

    @property
    def role_texts(self) -> dict[str, str]:
        """{"bos_token": "<s>", ...} for the roles that have a token: what templates and config files use."""
        return {f"{role}_token": text for role in ROLES if (text := getattr(self, role)) is not None}

    def id_of(self, text: str | None) -> int | None:
        """Return the id of an added token, or None where there is none of that text."""
        return None if text is None else self.ids.get(text, self.words.get(text))


class Tokenizer(ABC):
    """Text to ids and back; see the module docstring for the two doors."""

    prefix_rule: PrefixRule = "never"
    strips_space: bool = False  # whether decoding takes off the space that a dummy prefix left at the start

    def __init__(self, special: SpecialTokens, chat_template: ChatTemplate | None):
        self.special = special
        self.special_ids: dict[str, int] = dict(special.ids)
        self.added_ids: dict[str, int] = {**special.words, **special.ids}
        self.chat_template = chat_template  # may be replaced
        self._special_texts = {i: text for text, i in self.special_ids.items()}
        self._lost: dict[str, bool] = {}  # characters that have been tried
        self._added_texts = {i: text for text, i in self.added_ids.items()}
        # Tokens that no text in a message may become: the special ones, and whatever ends an answer.
        stops = self.stop_ids
        self.control_ids = self.special_ids | {text: i for text, i in special.words.items() if i in stops}
        self.control_stops = stops & set(self.control_ids.values())
        self.control_pattern = _any_of(self.control_ids)
        self._special_pattern = _any_of(self.special_ids)

    def stop_at(self, ids: Iterable[int]) -> None:
        """Let generation end at further ids, such as the files of a model name that this tokenizer is used with."""
        more = self.special.stops | {i for i in ids if i < self.vocab_size}
        self.__dict__.pop("stop_ids", None)
        Tokenizer.__init__(self, replace(self.special, stops=more), self.chat_template)

    # What a family provides.

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: one more than the largest id."""

    @abstractmethod
    def _encode_plain(self, segments: Sequence[str], at_start: Sequence[bool]) -> list[list[int]]:
        """Encode plain segments of well-formed text; those not at_start get no dummy prefix."""

    @abstractmethod
    def _token_table(self) -> list[bytes]:
        """Return the bytes of each id."""

    @abstractmethod
    def _identity(self) -> bytes:
        """Return what decides the ids of plain text, for the fingerprint."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the files that transformers' AutoTokenizer and llama.cpp's converter load with equal ids."""

    # What every family shares.

    @property
    def bos_id(self) -> int | None:
        return self.special.id_of(self.special.bos)

    @property
    def eos_id(self) -> int | None:
        return self.special.id_of(self.special.eos)

    @property
    def pad_id(self) -> int | None:
        return self.special.id_of(self.special.pad)

    @property
    def begin_ids(self) -> list[int]:
        """Ids that the family's own `encode` puts before a text."""
        return [self.bos_id] if self.special.adds_bos and self.bos_id is not None else []

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a turn or a text: those that the files name, eos, and added tokens known to be such."""
        names = {self.special.eos, *END_TOKENS}
        return self.special.stops | {i for text, i in self.added_ids.items() if text in names}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Encode text that somebody wrote; the text of a special token in it stays plain text.

        Raises CheckpointError if bos or eos is asked of a tokenizer that has none.
        """
        [ids] = self.encode_segments([text], at_start=[True])
        return self._marked(self.bos_id, "bos", bos) + ids + self._marked(self.eos_id, "eos", eos)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, each as `encode` does."""
        return self.encode_segments(texts, at_start=[True] * len(texts))

    def encode_segments(self, segments: Sequence[str], *, at_start: Sequence[bool]) -> list[list[int]]:
        """Encode plain segments; those not `at_start` continue a text, so they get no dummy prefix.

        No special id comes out, save the one for unknown characters: a vocabulary from tokens and merges may well
        build "</s>" out of "</" and "s>", so a segment where that happens is encoded in parts.
        """
        return self._encode_without(self._special_texts, self._special_pattern, segments, at_start)

    def _encode_without(
        self, unwanted: Mapping[int, str], pattern: re.Pattern[str], segments: Sequence[str], at_start: Sequence[bool]
    ) -> list[list[int]]:
        """Encode plain segments so that none of the tokens `unwanted`, whose texts `pattern` matches, comes out."""
        segments = [well_formed(segment) for segment in segments]
        encoded = self._encode_plain(segments, at_start) if segments else []
        for i, ids in enumerate(encoded):
            if not unwanted.keys().isdisjoint(ids) and pattern.search(segments[i]):
                encoded[i] = self._encode_in_parts(pattern, segments[i], at_start[i])
        return encoded

    def _encode_in_parts(self, pattern: re.Pattern[str], segment: str, at_start: bool) -> list[int]:
        cuts = [0, *(match.start() + 1 for match in pattern.finditer(segment)), len(segment)]
        parts = [segment[a:b] for a, b in itertools.pairwise(cuts)]
        encoded = self._encode_plain(parts, [at_start] + [False] * (len(parts) - 1))
        return list(itertools.chain.from_iterable(encoded))

    def parts_of(self, text: str) -> list[str]:
        """Return the parts that the family encodes one by one; most take a text whole."""
        return [text]

    def encode_rendered(self, text: str) -> list[int]:
        """Encode what a chat template produced: special tokens in it are parsed."""
        [ids] = self.encode_pieces([text])
        return ids

    def encode_pieces(self, pieces: Sequence[str], *, sentinel: str = "") -> list[list[int]]:
        """Encode the consecutive pieces of one rendered text; no token crosses from one piece into the next.

        `sentinel` is a character that breaks control-token text which must stay plain; it is taken out before
        encoding (see `chat.py`).
        """
        plain: list[str] = []
        at_start: list[bool] = []
        layout: list[list[int | None]] = []  # per piece: an added token's id, or None for the next plain segment
        begins = True
        for piece in pieces:
            row: list[int | None] = []
            at = 0
            for start, stop, token in [*self._added_in(piece), (len(piece), len(piece), None)]:
                segment = piece[at:start]
                if sentinel:
                    segment = segment.replace(sentinel, "")
                if segment:
                    row.append(None)
                    plain.append(segment)
                    at_start.append(begins)
                    begins = False
                if token is not None:
                    row.append(token)
                    begins = self.prefix_rule == "always"
                at = stop
            layout.append(row)
        unwanted = {i: text for text, i in self.control_ids.items()}
        encoded = iter(self._encode_without(unwanted, self.control_pattern, plain, at_start))
        result = []
        for row in layout:
            ids: list[int] = []
            for token in row:
                ids.extend(next(encoded) if token is None else (token,))
            result.append(ids)
        return result

    def _added_in(self, text: str) -> Iterable[tuple[int, int, int]]:
        """Yield (start, stop, id) of the added tokens in a rendered text; a family may know white space around them."""
        for match in self.control_pattern.finditer(text):
            yield match.start(), match.end(), self.control_ids[match[0]]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of an id (of special tokens: their text)."""
        return self._bytes[token_id]

    def text_bytes(self, ids: Sequence[int] | NDArray[Any], total: int | None = None) -> NDArray[np.float64]:
        """Bytes of text of each of `ids`, [n]: the denominators of bits per byte.

        Special tokens have none; a token that ends within a character counts its own bytes of it.
        total: UTF-8 bytes of the text, where `ids` are all of one: then they sum to that. A space that the family put
        before the text does not count, and where the tokenizer changes the text (NFC, unknown characters) the tokens
        have their shares of it.
        """
        sizes = self._text_sizes[np.asarray(ids, dtype=np.int64)]
        if total is None or sizes.sum() == total:
            return sizes
        first = int(np.argmax(sizes > 0)) if len(sizes) else 0
        if sizes.sum() == total + 1 and self.token_bytes(int(ids[first])).startswith(b" "):
            sizes[first] -= 1
            return sizes
        return sizes * (total / max(1.0, sizes.sum()))

    def lost(self, text: str) -> set[str]:
        """The characters of a text that the vocabulary cannot represent.

        Libraries silently drop the bytes that a vocabulary lacks, or use the token for unknown characters.
        """
        if self._lacking is None or not self._lacking.search(utf8(text)):
            return set()
        return {c for c in set(text) if self._is_lost(c)}

    @cached_property
    def _lacking(self) -> re.Pattern[bytes] | None:
        """Bytes without a token of their own: only a character with one of them can be lost."""
        alone = {token for token in self._bytes if len(token) == 1}
        lacking = [re.escape(b) for b in map(bytes, zip(range(256), strict=True)) if b not in alone]
        return re.compile(b"[" + b"".join(lacking) + b"]") if lacking else None

    def _is_lost(self, character: str) -> bool:
        if character not in self._lost:
            assert self._lacking is not None
            lost = False
            if self._lacking.search(utf8(character)):
                ids = self.encode(character)
                said = b"".join(self._bytes[i] for i in ids)
                unknown = self.special_ids.get(self.special.unk or "") in ids
                lost = unknown or not said.strip() or b"\xef\xbf\xbd" in said.decode("utf-8", "replace").encode()
            self._lost[character] = lost
        return self._lost[character]

    @cached_property
    def unused_ids(self) -> list[int]:
        """Ids below `vocab_size` that no token has."""
        return [i for i, token in enumerate(self._bytes) if not token and i not in self._special_texts]

    def holds(self, other: Tokenizer) -> bool:
        """Whether every id of `other` has the same bytes here, so that a model of this tokenizer can read its ids."""
        n = other.vocab_size
        return n <= self.vocab_size and all(self.token_bytes(i) == other.token_bytes(i) for i in range(n))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        joined = b"".join(self._bytes[i] for i in map(int, ids) if not (skip_special and i in self._special_texts))
        if self.strips_space:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        """Return an incremental decoder for ids that arrive one at a time."""
        return TokenStream(self, skip_special)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides ids and the template."""
        s = self.special
        facts = {
            "plain": self._identity_hash,
            "special": sorted(self.special_ids.items()),
            "roles": [s.bos, s.eos, s.pad],
            "stop": sorted(self.stop_ids),
            "template": self.chat_template and self.chat_template.identity,
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def _identity_hash(self) -> str:
        return hashlib.sha256(type(self).__name__.encode() + b"\0" + self._identity()).hexdigest()

    @cached_property
    def _bytes(self) -> list[bytes]:
        return self._token_table()

    @cached_property
    def _text_sizes(self) -> NDArray[np.float64]:
        special = self._special_texts
        return np.array([0 if i in special else len(data) for i, data in enumerate(self._bytes)], dtype=np.float64)

    def _marked(self, token_id: int | None, role: str, wanted: bool) -> list[int]:
        if not wanted:
            return []
        if token_id is None:
            raise CheckpointError(f"this tokenizer has no {role} token; encode without {role}=True")
        return [token_id]


class TokenStream:
    """Decodes ids one by one and hands out only complete UTF-8 characters.

    What all pushes and the flush returned, joined, equals `Tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip = tokenizer._special_texts if skip_special else {}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_space  # not yet done

    def push(self, token_id: int) -> str:
        """Take the next id; return the characters that are now complete (often one word, sometimes none)."""
        if token_id in self._skip:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD where the ids stopped inside a character."""
        return self._decoder.decode(b"", final=True)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first; for none of them, one that matches nowhere."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def well_formed(text: str) -> str:
    """Return text that has a UTF-8 form: halves of surrogate pairs joined, lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def utf8(text: str) -> bytes:
    """Return the UTF-8 form of text, broken surrogates mended as in `encode`."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return well_formed(text).encode()


def usable_threads() -> int:
    """Threads for one batch: every core, or one where `tokenizers` is told to use one, as in a worker of `pool.py`."""
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count() or 1
