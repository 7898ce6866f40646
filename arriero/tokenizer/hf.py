"""tokenizer.json, through the `tokenizers` library.

The file states its whole pipeline, so the library decides every id; our code only keeps special tokens out of plain
text. The flags of added tokens (stripping white space, whole words only and so on) are the library's matter too: a
rendered text is encoded in one call, with special tokens enabled for its duration.
Two kinds occur among Llamas: byte-level BPE (Llama 3, SmolLM2), and SentencePiece's BPE rebuilt from tokens with a
space marker and byte fallback (Llama 1 and 2).
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, AnyStr

from tokenizers import Encoding, processors
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError
from arriero.io.paths import as_path
from arriero.io.reading import reading
from arriero.show.terminal import warn_once
from arriero.tokenizer import files
from arriero.tokenizer.base import PrefixRule, SpecialTokens, Tokenizer, well_formed
from arriero.tokenizer.template import ChatTemplate

SPACE_MARKER = "▁"
_FAULT = "the tokenizers library fails on this text, as it may where added tokens overlap"
_REMEDY = "leave the text out, or take flags off the added tokens"
_FEW = 16  # texts that are encoded one by one: to wake other threads for them would cost more


class HfTokenizer(Tokenizer):
    """A `tokenizers` pipeline; `backend` parses special tokens only while `_parse` holds the lock."""

    def __init__(self, backend: Backend, special: SpecialTokens, chat_template: ChatTemplate | None = None):
        super().__init__(special, chat_template)
        backend.encode_special_tokens = True  # the text of a special token is split like any other
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._lock = threading.Lock()
        self._state = json.loads(backend.to_str())
        self.prefix_rule = _prefix_rule(self._state)
        self._continuing = backend if self.prefix_rule == "never" else _without_prefix(self._state)
        self.byte_level = _decodes_bytes(self._state)
        self.strips_space = any(step["type"] == "Strip" for step in _parts(self._state["decoder"], "decoders"))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        for backend in (self.backend, self._continuing):  # the library forgets this on its way to a worker process
            backend.encode_special_tokens = True

    @cached_property
    def vocab_size(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def begin_ids(self) -> list[int]:  # type: ignore[override]
        """Ids that the file's post-processor puts before a text."""
        with reading("the tokenizer", _FAULT, _REMEDY):
            encoding = self.backend.encode("a")
        marks = itertools.takewhile(
            lambda pair: pair[1] == 1, zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        )
        return [token for token, _ in marks]

    def _encode_plain(self, segments: Sequence[str], at_start: Sequence[bool]) -> list[list[int]]:
        result: list[list[int]] = [[]] * len(segments)
        for backend, wanted in ((self.backend, True), (self._continuing, False)):
            rows = [i for i, start in enumerate(at_start) if start is wanted]
            with self._lock, reading("the tokenizer", _FAULT, _REMEDY):
                encoded = _encode_many(backend, [segments[i] for i in rows])
            for i, ids in zip(rows, encoded, strict=True):
                result[i] = ids
        return result

    def encode_pieces(self, pieces: Sequence[str], *, sentinel: str = "") -> list[list[int]]:
        """As `Tokenizer.encode_pieces`; by the library piece by piece, where no message holds a control token."""
        if sentinel:
            return super().encode_pieces(pieces, sentinel=sentinel)
        result: list[list[int]] = []
        begins = True
        for piece in pieces:
            ids = self._encode_piece(well_formed(piece), begins)
            result.append(ids)
            if piece:
                begins = self.prefix_rule == "always" and bool(ids) and ids[-1] in self._added_texts
        return result

    def _encode_piece(self, text: str, begins: bool) -> list[int]:
        if begins or self.prefix_rule == "never":
            return self._parse(self.backend, text, offsets=False).ids
        encoding = self._parse(self._continuing, text)
        first = next((k for k, i in enumerate(encoding.ids) if i in self._added_texts), None)
        if first is None:
            return encoding.ids
        # From its first added token on, a piece is encoded as it is anywhere.
        start = encoding.offsets[first][0]
        return encoding.ids[:first] + self._parse(self.backend, text[start:], offsets=False).ids

    def _added_in(self, text: str) -> Iterable[tuple[int, int, int]]:
        encoding = self._parse(self.backend, text)
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._added_texts:
                yield start, stop, token

    def _parse(self, backend: Backend, text: str, offsets: bool = True) -> Encoding:
        """Encode text in which special tokens are the tokens that they spell."""
        with self._lock, reading("the tokenizer", _FAULT, _REMEDY):
            backend.encode_special_tokens = False
            try:
                return backend.encode(text, add_special_tokens=False) if offsets else _encode_fast(backend, text)
            finally:
                backend.encode_special_tokens = True

    def _token_table(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            table[i] = (byte_level_bytes if self.byte_level else marked_bytes)(token)
        for i, added in self.backend.get_added_tokens_decoder().items():
            table[i] = added.content.encode()
        return table

    def _identity(self) -> bytes:
        return self.backend.to_str().encode()

    def save(self, directory: str | Path) -> None:
        files.write_tokenizer(as_path(directory), self.backend, self.special, self.chat_template)


def load_tokenizer_json(path: Path) -> HfTokenizer:
    """Load a tokenizer.json, with the roles and the chat template in the files beside it."""
    with reading(path, "the tokenizers library cannot read it"):
        backend = Backend.from_file(str(path))
    declared = files.read_declared(path.parent)
    files.add_declared(backend, declared)
    special = files.special_tokens_of(backend, declared, adds_bos=False)
    tokenizer = HfTokenizer(backend, special, files.read_chat_template(path.parent, special))
    adds_bos = tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.begin_ids
    tokenizer.special = replace(special, adds_bos=adds_bos)
    if files.read_flag(path.parent, "add_bos_token", adds_bos) is not adds_bos:
        warn_once(
            f"{path.parent / files.CONFIG} says add_bos_token {str(not adds_bos).lower()}, the post-processor in "
            f"{path.name} says otherwise and is followed, as in transformers"
        )
    return tokenizer


def _encode_fast(backend: Backend, text: str) -> Encoding:
    """Encode without offsets, which take a quarter of the time; only the batch call can leave them out."""
    [encoding] = backend.encode_batch_fast([text], add_special_tokens=False)
    return encoding


def _encode_many(backend: Backend, texts: list[str]) -> list[list[int]]:
    if len(texts) < _FEW:
        return [_encode_fast(backend, text).ids for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _parts(component: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder, which may be one step or a sequence."""
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [dict(component)]


def _prefix_rule(state: Mapping[str, Any]) -> PrefixRule:
    if any(step["type"] == "Prepend" for step in _parts(state["normalizer"], "normalizers")):
        return "always"
    for step in _parts(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if step["type"] == "ByteLevel" and step["add_prefix_space"]:
            return "always"
    return "never"


def _without_prefix(state: Mapping[str, Any]) -> Backend:
    """Return the same pipeline with nothing put before the text, for segments that continue one."""
    normalizers = [s for s in _parts(state["normalizer"], "normalizers") if s["type"] != "Prepend"]
    pretokenizers = _parts(state["pre_tokenizer"], "pretokenizers")
    for step in pretokenizers:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
    changed = {
        **state,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers} if pretokenizers else None,
    }
    backend = Backend.from_str(json.dumps(changed))
    backend.encode_special_tokens = True
    return backend


def _decodes_bytes(state: Mapping[str, Any]) -> bool:
    steps = {step["type"] for step in _parts(state["decoder"], "decoders")}
    if "ByteLevel" in steps:
        return True
    if "ByteFallback" in steps:
        return False
    raise CheckpointError(
        f"tokenizer.json decodes with {sorted(steps) or 'nothing'}; Arriero reads byte-level BPE (ByteLevel) "
        "and SentencePiece-like BPE (ByteFallback)"
    )


def with_bos(backend: Backend, special: SpecialTokens) -> Backend:
    """State in the pipeline that `bos` precedes a text, where the family does so: for those who load what we save."""
    if special.adds_bos and special.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special.bos} $A",
            pair=f"{special.bos} $A {special.bos}:1 $B:1",
            special_tokens=[(special.bos, special.ids[special.bos])],
        )
    return backend


@lru_cache(maxsize=1)
def byte_level_alphabet() -> dict[int, str]:
    """Return the letter that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters represent themselves; the other 68 bytes get the letters from U+0100 on, in order.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in itself else next(others)) for byte in range(256)}


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in byte_level_alphabet().items()}


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; of a token with other letters, its own UTF-8."""
    try:
        return bytes(map(_byte_of_letter().__getitem__, token))
    except KeyError:
        return token.encode()


def byte_level_text(data: bytes) -> str:
    """Return the byte-level spelling of bytes; the way back from `byte_level_bytes`."""
    return "".join(map(byte_level_alphabet().__getitem__, data))


def merges_into(token: AnyStr, order: Mapping[AnyStr, float]) -> list[tuple[AnyStr, AnyStr]]:
    """Return every pair of tokens that joins to `token`, in their `order`: its merges in a tokenizer.json."""
    pairs = ((token[:k], token[k:]) for k in range(1, len(token)))
    usable = [(left, right) for left, right in pairs if left in order and right in order]
    return sorted(usable, key=lambda pair: (order[pair[0]], order[pair[1]]))


BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def marked_bytes(token: str) -> bytes:
    """Return the bytes of a SentencePiece token: "▁" is a space and "<0x0A>" the byte 10."""
    byte = BYTE_PIECE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARKER, " ").encode()
