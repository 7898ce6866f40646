"""Llama 1 and 2's tokenizer.model, through the sentencepiece library.

SentencePiece puts a space before a text (its "dummy prefix") so that a word is the same piece at the start as after a
space. Meta encodes each stretch between special tokens as a text of its own, so the prefix returns after every
`<s>` and `</s>`; llama.cpp and Llama 2's tokenizer.json do the same, and so do we. A segment that continues a text
(an answer after its prompt) gets none: a second processor is loaded from the same model with the prefix switched off.

A model file is one protobuf message. We need to write one where a GGUF file gives pieces and scores, and to append
one setting; both are a few bytes of wire format, written here instead of depending on protobuf.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError
from arriero.tokenizer import files
from arriero.tokenizer.base import SpecialTokens, Tokenizer, usable_threads
from arriero.tokenizer.hf import BYTE_PIECE, SPACE_MARKER, marked_bytes, with_bos
from arriero.tokenizer.template import ChatTemplate

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def _varint(n: int) -> bytes:
    """Return n as protobuf writes it: 7 bits a byte, low first (negative: as 64 bits)."""
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _field(number: int, value: int | float | bytes) -> bytes:
    """Return one protobuf field: an integer, a 32-bit float, or bytes (a string or an inner message)."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


# A message given twice is merged, the later winning: appended to a model, this switches the dummy prefix off.
_NO_DUMMY_PREFIX = _field(3, _field(3, 0))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model with byte fallback; `model` is the file's bytes."""

    strips_space = True
    prefix_rule = "always"

    def __init__(self, model: bytes, special: SpecialTokens, chat_template: ChatTemplate | None = None):
        super().__init__(special, chat_template)
        self.model = model
        self.processor = _processor(model)
        self._continuing = _processor(model + _NO_DUMMY_PREFIX)

    @property
    def vocab_size(self) -> int:
        return self.processor.get_piece_size()

    def _encode_plain(self, segments: Sequence[str], at_start: Sequence[bool]) -> list[list[int]]:
        result: list[list[int]] = [[]] * len(segments)
        for processor, wanted in ((self.processor, True), (self._continuing, False)):
            rows = [i for i, start in enumerate(at_start) if start is wanted]
            encoded = processor.encode([segments[i] for i in rows], num_threads=usable_threads())
            for i, ids in zip(rows, encoded, strict=True):
                result[i] = ids
        return result

    def pieces(self) -> list[tuple[str, float, int]]:
        """Return (piece, score, type) of every id."""
        return list(_read_pieces(self.model))

    def _token_table(self) -> list[bytes]:
        return [
            piece.encode() if kind in (CONTROL, UNKNOWN) else marked_bytes(piece) for piece, _, kind in self.pieces()
        ]

    def _identity(self) -> bytes:
        return self.model

    def to_backend(self) -> Backend:
        """Return the same vocabulary as a `tokenizers` pipeline; Llama 2's tokenizer.json is built like this."""
        trainer, normalizer = _read_settings(self.model)
        pieces = self.pieces()
        user_defined = [piece for piece, _, kind in pieces if kind == USER_DEFINED]
        if trainer.get(3) != _BPE or normalizer.get(2) or normalizer.get(4, 1) or user_defined:
            raise CheckpointError(
                "this SentencePiece model cannot be written as tokenizer.json: only BPE without normalisation, extra "
                "whitespace kept, and without user-defined symbols can (Llama 1 and 2 are of this kind)"
            )
        vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        unknown = next(piece for piece, _, kind in pieces if kind == UNKNOWN)
        backend = Backend(
            models.BPE(vocab=vocabulary, merges=merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARKER)]
        undo: list[decoders.Decoder] = [decoders.Replace(SPACE_MARKER, " "), decoders.ByteFallback(), decoders.Fuse()]
        if normalizer.get(3, 1):
            steps.insert(0, normalizers.Prepend(SPACE_MARKER))
            undo.append(decoders.Strip(" ", 1, 0))
        backend.normalizer = normalizers.Sequence(steps)
        backend.decoder = decoders.Sequence(undo)
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special_ids])
        return with_bos(backend, self.special)

    def save(self, directory: str | Path) -> None:
        files.write_tokenizer(Path(directory), self.to_backend(), self.special, self.chat_template)
        (Path(directory) / "tokenizer.model").write_bytes(self.model)


_BPE = 2  # TrainerSpec.model_type


def merges_of(pieces: Sequence[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece merges, best score of the result first."""
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda p: -scores[p]):  # stable: equal scores keep the order of ids
        pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        usable = [(left, right) for left, right in pairs if left in scores and right in scores]
        merges += sorted(usable, key=lambda pair: (-scores[pair[0]], -scores[pair[1]]))
    return merges


def pieces_of(state: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Return (piece, score, type) by id for a tokenizer.json that holds a SentencePiece vocabulary.

    The file has merges instead of scores; a piece's score is minus the place of the first merge that makes it.
    """
    model, added = state["model"], {entry["id"]: entry for entry in state["added_tokens"]}
    scores: dict[str, float] = {}
    for place, merge in enumerate(model["merges"]):
        scores.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), -float(place))
    names = {**{i: piece for piece, i in model["vocab"].items()}, **{i: e["content"] for i, e in added.items()}}
    pieces: list[tuple[str, float, int]] = []
    for i in range(max(names) + 1):
        piece = names.get(i, f"[PAD{i}]")
        if piece == model["unk_token"]:
            kind = UNKNOWN
        elif i in added:
            kind = CONTROL if added[i]["special"] else USER_DEFINED
        elif i not in names:
            kind = UNUSED
        else:
            kind = BYTE if BYTE_PIECE.fullmatch(piece) else NORMAL
        pieces.append((piece, scores.get(piece, -float(len(model["merges"]))) if kind == NORMAL else 0.0, kind))
    return pieces


def load_sentencepiece_model(path: Path) -> SentencePieceTokenizer:
    """Load a SentencePiece .model file; the files beside it may name other special tokens than the model does."""
    model = path.read_bytes()
    try:
        processor = _processor(model)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    ids = {processor.id_to_piece(i): i for i in range(processor.get_piece_size()) if _is_special(processor, i)}
    special = files.read_special_tokens(path.parent, ids, adds_bos=True)
    own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    for role, i in own.items():
        if i >= 0 and getattr(special, role) is None:
            special = replace(special, **{role: processor.id_to_piece(i)})  # type: ignore[arg-type]
    return SentencePieceTokenizer(model, special, files.read_chat_template(path.parent, special))


def tokenizer_from_pieces(
    fields: Mapping[str, Any], special: SpecialTokens, template: ChatTemplate | None
) -> SentencePieceTokenizer:
    """Build a SentencePiece model from the tokens, scores and types in GGUF metadata."""
    tokens = fields["tokenizer.ggml.tokens"]
    try:
        scores, types = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
    except KeyError as error:
        raise CheckpointError(
            f"a SentencePiece tokenizer in GGUF needs {error.args[0]}; convert the model again"
        ) from error
    model = write_model(
        list(zip(tokens, map(float, scores), map(int, types), strict=True)),
        ids={role: special.ids.get(getattr(special, role) or "", -1) for role in ("unk", "bos", "eos", "pad")},
        dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
    )
    return SentencePieceTokenizer(model, special, template)


def write_model(
    pieces: Sequence[tuple[str, float, int]], ids: Mapping[str, int], *, dummy_prefix: bool = True
) -> bytes:
    """Return a SentencePiece model file with Llama's settings: BPE, byte fallback, no normalisation.

    Field numbers are those of sentencepiece_model.proto.
    """
    body = b"".join(_field(1, _field(1, p.encode()) + _field(2, s) + _field(3, t)) for p, s, t in pieces)
    fallback = any(kind == BYTE for _, _, kind in pieces)
    roles = zip((40, 41, 42, 43), (ids["unk"], ids["bos"], ids["eos"], ids["pad"]), strict=True)
    trainer = _field(3, _BPE) + _field(35, int(fallback)) + b"".join(_field(n, i) for n, i in roles)
    normalizer = _field(1, b"identity") + _field(3, int(dummy_prefix)) + _field(4, 0) + _field(5, 1)
    return body + _field(2, trainer) + _field(3, normalizer)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise CheckpointError(
            "the sentencepiece library cannot read this as a model; give a model directory, tokenizer.json, "
            "tokenizer.model or .gguf, or fetch the file again"
        ) from error


def _is_special(processor: sentencepiece.SentencePieceProcessor, i: int) -> bool:
    return processor.is_control(i) or processor.is_unknown(i)


def _read_fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (field number, value) of a protobuf message: integers, 32-bit floats, and bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
        elif wire == 5:
            yield number, struct.unpack_from("<f", message, at)[0]
            at += 4
        elif wire == 1:
            yield number, message[at : at + 8]
            at += 8
        else:
            size = varint()
            yield number, message[at : at + size]
            at += size


def _read_pieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    for number, value in _read_fields(model):
        if number == 1:
            fields: dict[int, Any] = dict(_read_fields(cast(bytes, value)))
            yield fields[1].decode(), fields.get(2, 0.0), fields.get(3, NORMAL)


def _read_settings(model: bytes) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the fields of TrainerSpec and NormalizerSpec."""
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _read_fields(model):
        if number in specs:
            specs[number].update(_read_fields(cast(bytes, value)))
    return specs[2], specs[3]
