"""tokenizer.json, through the `tokenizers` library.

The file states its whole pipeline, so the library decides every id; we only keep special tokens out of plain text.
Two kinds occur among Llamas: byte-level BPE (Llama 3, SmolLM2), and SentencePiece's BPE rebuilt from tokens with a
space marker and byte fallback (Llama 1 and 2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, AnyStr

from tokenizers import Tokenizer as Backend
from tokenizers import processors

from arriero.errors import CheckpointError
from arriero.paths import as_path
from arriero.tokenizer import files
from arriero.tokenizer.base import PrefixRule, SpecialTokens, Tokenizer
from arriero.tokenizer.template import ChatTemplate

SPACE_MARKER = "▁"
_FEW = 16  # the batch call starts a thread pool, which costs more than so few texts


class HfTokenizer(Tokenizer):
    """A `tokenizers` pipeline; `backend` is never asked to add or parse special tokens."""

    def __init__(self, backend: Backend, special: SpecialTokens, chat_template: ChatTemplate | None = None):
        super().__init__(special, chat_template)
        backend.encode_special_tokens = True  # the text of a special token is split like any other
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._state = json.loads(backend.to_str())
        self.prefix_rule = _prefix_rule(self._state)
        self._continuing = backend if self.prefix_rule == "never" else _without_prefix(self._state)
        self.byte_level = _decodes_bytes(self._state)
        self.strips_space = any(step["type"] == "Strip" for step in _parts(self._state["decoder"], "decoders"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for backend in (self.backend, self._continuing):  # the library forgets this on its way to a worker process
            backend.encode_special_tokens = True

    @cached_property
    def vocab_size(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def _encode_plain(self, segments: Sequence[str], at_start: Sequence[bool]) -> list[list[int]]:
        result: list[list[int]] = [[]] * len(segments)
        for backend, wanted in ((self.backend, True), (self._continuing, False)):
            rows = [i for i, start in enumerate(at_start) if start is wanted]
            for i, ids in zip(rows, _encode_many(backend, [segments[i] for i in rows]), strict=True):
                result[i] = ids
        return result

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
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: the tokenizers library cannot read it ({error})") from error
    ids = {added.content: i for i, added in backend.get_added_tokens_decoder().items() if added.special}
    special = files.read_special_tokens(path.parent, ids, adds_bos=_post_processor_adds(backend))
    return HfTokenizer(backend, special, files.read_chat_template(path.parent, special))


def _encode_many(backend: Backend, texts: list[str]) -> list[list[int]]:
    if len(texts) < _FEW:
        return [backend.encode(text, add_special_tokens=False).ids for text in texts]
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


def _post_processor_adds(backend: Backend) -> bool:
    return len(backend.encode("", add_special_tokens=True).ids) > 0


@lru_cache(maxsize=1)
def byte_level_alphabet() -> dict[int, str]:
    """Return the letter that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2).

    Printable Latin-1 stands for itself; the other 68 bytes get the letters from U+0100 on, in order.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in itself else next(others)) for byte in range(256)}


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in byte_level_alphabet().items()}


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; a token with other letters stands for its own UTF-8."""
    table = _byte_of_letter()
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()


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
