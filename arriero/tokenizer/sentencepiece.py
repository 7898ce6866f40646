"""Llama 1 and 2's tokenizer.model, through the sentencepiece library.

SentencePiece puts a space before a text (its "dummy prefix") so that a word is the same piece at the start as after a
space. Meta encodes each stretch between special tokens as a text of its own, so the prefix returns after every
`<s>` and `</s>`; llama.cpp and Llama 2's tokenizer.json do the same, and so do we. A segment that continues a text
(an answer after its prompt) gets none: a second processor is loaded from the same model with the prefix switched off.

That is so for a file alone, as Meta gives it. In a Hugging Face directory (with config.json or tokenizer_config.json) a
tokenizer.model is what transformers' LlamaTokenizer makes of it: a `tokenizers` pipeline, in which the dummy prefix
stands at the start of a text only (unless "legacy" is true), with the added tokens that the files declare.

A model file is one protobuf message, which the library reads. We write one where a GGUF file gives pieces and scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError
from arriero.io.paths import as_path
from arriero.tokenizer import files
from arriero.tokenizer.base import SpecialTokens, Tokenizer, usable_threads
from arriero.tokenizer.hf import BYTE_PIECE, SPACE_MARKER, HfTokenizer, marked_bytes, merges_into, with_bos
from arriero.tokenizer.protobuf import field, fields
from arriero.tokenizer.template import ChatTemplate

# Fields by number, as in sentencepiece_model.proto: of a model, a piece, the trainer's and the normalizer's settings.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, BYTE_FALLBACK, UNK_ID, BOS_ID, EOS_ID, PAD_ID = 3, 35, 40, 41, 42, 43
NAME, CHARACTER_MAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_SPACES, ESCAPE_SPACES = 1, 2, 3, 4, 5
# Types of a piece, and the one model type that Llamas have.
_TYPES = NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2

_NO_DUMMY_PREFIX = field(NORMALIZER, field(ADD_DUMMY_PREFIX, 0))  # appended to a model, it switches the prefix off


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model with byte fallback; `model` is the file's bytes."""

    def __init__(self, model: bytes, special: SpecialTokens, chat_template: ChatTemplate | None = None):
        super().__init__(special, chat_template)
        self.model = model
        self.processor = _processor(model)
        self._continuing = _processor(model + _NO_DUMMY_PREFIX)
        trainer, normalizer = _read_settings(model)
        self.is_bpe = trainer.get(MODEL_TYPE) == BPE
        self.normalises = bool(normalizer.get(CHARACTER_MAP))
        self.collapses_spaces = bool(normalizer.get(REMOVE_EXTRA_SPACES, 1))
        self.strips_space = bool(normalizer.get(ADD_DUMMY_PREFIX, 1))
        self.prefix_rule = "always" if self.strips_space else "never"

    @property
    def is_plain_bpe(self) -> bool:
        """Whether a `tokenizers` pipeline can state the model: BPE that takes a text as it is."""
        return self.is_bpe and not self.normalises and not self.collapses_spaces

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
        if any(kind == USER_DEFINED and piece not in self.special.words for piece, _, kind in self.pieces()):
            raise CheckpointError(
                "this SentencePiece model cannot be written as tokenizer.json: it has user-defined symbols, which the "
                "tokenizers library would not find in the same places"
            )
        steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARKER)]
        if self.prefix_rule == "always":
            steps.insert(0, normalizers.Prepend(SPACE_MARKER))
        backend = self._pipeline(prefixed=self.prefix_rule == "always")
        backend.normalizer = normalizers.Sequence(steps)
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special_ids])
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in self.special.words])
        return with_bos(backend, self.special)

    def to_llama_tokenizer(self, legacy: bool, prefixed: bool) -> Backend:
        """Return the pipeline that transformers' LlamaTokenizer makes of the file."""
        backend = self._pipeline(prefixed)
        scheme = ("always" if legacy else "first") if prefixed else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARKER, prepend_scheme=scheme, split=False)
        kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
        tokens = [(piece, kinds[kind]) for piece, _, kind in self.pieces() if kind in kinds]
        backend.add_tokens([AddedToken(piece, special=special, normalized=False) for piece, special in tokens])
        return backend

    def _pipeline(self, prefixed: bool) -> Backend:
        """Return vocabulary, merges and decoder, for a text in which "▁" replaces each space."""
        pieces = self.pieces()
        if not self.is_plain_bpe:
            raise CheckpointError(
                "this SentencePiece model cannot be written as tokenizer.json: only BPE without normalisation, extra "
                "whitespace kept, can (Llama 1 and 2 are of this kind)"
            )
        vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        unknown = next((piece for piece, _, kind in pieces if kind == UNKNOWN), None)
        if unknown is None:
            raise CheckpointError("damaged: no piece of it stands for unknown text; fetch the file again")
        backend = Backend(
            models.BPE(vocab=vocabulary, merges=merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        undo: list[decoders.Decoder] = [decoders.Replace(SPACE_MARKER, " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefixed:
            undo.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(undo)
        return backend

    def save(self, directory: str | Path) -> None:
        files.write_tokenizer(as_path(directory), self.to_backend(), self.special, self.chat_template)
        (as_path(directory) / "tokenizer.model").write_bytes(self.model)


def merges_of(pieces: Sequence[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece merges, best score of the result first."""
    order = {piece: -score for piece, score, kind in pieces if kind == NORMAL}
    by_score = sorted(order, key=order.__getitem__)  # stable: equal scores keep the order of ids
    return [pair for piece in by_score for pair in merges_into(piece, order)]


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


def load_sentencepiece_model(path: Path) -> Tokenizer:
    """Load a SentencePiece .model file, by itself or with the files of a Hugging Face directory beside it."""
    model = path.read_bytes()
    try:
        tokenizer = _by_itself(model)
        return _with_files(tokenizer, path.parent)
    except CheckpointError as error:
        raise error if str(path.parent) in str(error) else CheckpointError(f"{path}: {error}") from error


def _by_itself(model: bytes) -> SentencePieceTokenizer:
    processor = _processor(model)
    pieces = [piece for piece, _, _ in _read_pieces(model)]
    if len(pieces) != processor.get_piece_size():
        raise CheckpointError(f"damaged: {len(pieces)} pieces, of which the library reads {processor.get_piece_size()}")
    own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    special = SpecialTokens(
        ids={piece: i for i, piece in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)},
        adds_bos=True,
        **{role: pieces[i] for role, i in own.items() if i >= 0},  # type: ignore[arg-type]
    )
    return SentencePieceTokenizer(model, special)


def _with_files(alone: SentencePieceTokenizer, directory: Path) -> Tokenizer:
    """Return the tokenizer as the files in its directory would have it: see the module's text."""
    defaults = {role: text for role in files.ROLES if (text := getattr(alone.special, role)) is not None}
    declared = files.read_declared(directory, defaults)
    config = files.read_json(directory / files.CONFIG)
    name = str(config.get("tokenizer_class", "LlamaTokenizer"))
    beside = bool(config) or any((directory / file).is_file() for file in ("config.json", files.ADDED, files.MAP))
    if beside and alone.is_plain_bpe and name.removesuffix("Fast") == "LlamaTokenizer":
        return _llama_tokenizer(alone, declared)
    ids, directory = alone.special.ids, declared.directory
    further = [text for text in {t.content for t in declared.placed.values()} | set(declared.named) if text not in ids]
    if further:
        raise CheckpointError(
            f"{directory}: the files declare {further[0]!r}, which tokenizer.model lacks; tokens are added for the "
            f"tokenizer_class LlamaTokenizer (here {name}) to BPE without normalisation that keeps extra whitespace: "
            "give the model's tokenizer.json"
        )
    special = replace(
        alone.special,
        stops=files.read_stops(directory),
        adds_bos=files.read_flag(directory, "add_bos_token", True),
        **{role: declared.roles.get(role) for role in files.ROLES},  # type: ignore[arg-type]
    )
    return SentencePieceTokenizer(alone.model, special, files.read_chat_template(directory, special))


def _llama_tokenizer(alone: SentencePieceTokenizer, declared: files.Declared) -> HfTokenizer:
    """Return what transformers' LlamaTokenizer is with these files."""
    directory = declared.directory
    legacy = files.read_flag(directory, "legacy", False)
    prefixed = files.read_flag(directory, "add_prefix_space", alone.prefix_rule == "always")
    backend = files.add_declared(alone.to_llama_tokenizer(legacy, prefixed), declared)
    special = files.special_tokens_of(backend, declared, adds_bos=files.read_flag(directory, "add_bos_token", True))
    return HfTokenizer(with_bos(backend, special), special, files.read_chat_template(directory, special))


def tokenizer_from_pieces(
    fields: Mapping[str, Any], special: SpecialTokens, template: ChatTemplate | None
) -> Tokenizer:
    """Build a SentencePiece model from the tokens, scores and types in GGUF metadata.

    With user-defined tokens it becomes a `tokenizers` pipeline, which splits at them as llama.cpp does: at the text as
    it is written, the dummy prefix before each stretch between. SentencePiece itself has one text and one prefix.
    """
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
        collapse_spaces=bool(fields.get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )
    tokenizer = SentencePieceTokenizer(model, special, template)
    return HfTokenizer(tokenizer.to_backend(), special, template) if special.words else tokenizer


def write_model(
    pieces: Sequence[tuple[str, float, int]],
    ids: Mapping[str, int],
    *,
    dummy_prefix: bool = True,
    collapse_spaces: bool = False,
) -> bytes:
    """Return a SentencePiece model file with Llama's settings: BPE, byte fallback, no normalisation."""
    body = b"".join(
        field(PIECES, field(PIECE, piece.encode()) + field(SCORE, score) + field(TYPE, kind))
        for piece, score, kind in pieces
    )
    fallback = any(kind == BYTE for _, _, kind in pieces)
    roles = {UNK_ID: ids["unk"], BOS_ID: ids["bos"], EOS_ID: ids["eos"], PAD_ID: ids["pad"]}
    trainer = {MODEL_TYPE: BPE, BYTE_FALLBACK: int(fallback), **roles}
    normalizer = {ADD_DUMMY_PREFIX: int(dummy_prefix), REMOVE_EXTRA_SPACES: int(collapse_spaces), ESCAPE_SPACES: 1}
    named = field(NAME, b"identity") + _message(normalizer)
    return body + field(TRAINER, _message(trainer)) + field(NORMALIZER, named)


def _message(values: Mapping[int, int]) -> bytes:
    return b"".join(field(number, value) for number, value in values.items())


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeError) as error:
        raise CheckpointError(
            "the sentencepiece library cannot read this as a model; give a model directory, tokenizer.json, "
            "tokenizer.model or .gguf, or fetch the file again"
        ) from error


def _read_pieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    """Yield (piece, score, type); values of another kind than the library's own count as absent, as they do there."""
    for number, value in fields(model):
        if number == PIECES and isinstance(value, bytes):
            piece: dict[int, Any] = dict(fields(value))
            text, score, kind = piece.get(PIECE), piece.get(SCORE, 0.0), piece.get(TYPE, NORMAL)
            try:
                name = text.decode() if isinstance(text, bytes) else ""
            except UnicodeDecodeError as error:
                raise CheckpointError(f"damaged: the piece {text!r:.60} is not UTF-8; fetch the file again") from error
            yield name, score if isinstance(score, float) else 0.0, kind if kind in _TYPES else NORMAL


def _read_settings(model: bytes) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the fields of the trainer's and of the normalizer's settings."""
    settings: dict[int, dict[int, Any]] = {TRAINER: {}, NORMALIZER: {}}
    for number, value in fields(model):
        if number in settings and isinstance(value, bytes):
            settings[number].update(fields(value))
    return settings[TRAINER], settings[NORMALIZER]
