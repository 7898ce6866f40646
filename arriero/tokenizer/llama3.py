"""Llama 3's tokenizer.model: byte-level BPE in tiktoken's format, through tiktoken.

The file is 128,000 lines of "base64 rank"; the 256 special tokens after them are not in it, they are Meta's published
list. tiktoken's regular-expression engine gives up on whitespace runs of about 100,000 characters, so text is cut
just where Meta's loader cuts it: every 400,000 characters, and every 25,000 within a run of whitespace or of anything
else. Ids are therefore Meta's on every text; the tokenizer.json that `save` writes has no such cuts.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError
from arriero.io.fields import Fields
from arriero.io.paths import as_path
from arriero.tokenizer import files
from arriero.tokenizer.base import SpecialTokens, Tokenizer, usable_threads
from arriero.tokenizer.hf import HfTokenizer, byte_level_text, merges_into, with_bos
from arriero.tokenizer.template import ChatTemplate

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL = 256
# What the released models name, at their offsets in the block of 256; every other place is reserved.
_NAMES_3_0 = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_NAMES_3_1 = {**_NAMES_3_0, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}

_FEW = 64  # the batch call starts a thread pool, which costs more than so few texts
_MAX_TEXT = 400_000
_MAX_RUN = 25_000
# Tried where a run begins only; tried at each of its characters, a run would cost the square of its length.
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_MAX_RUN + 1},}}|(?<!\S)\S{{{_MAX_RUN + 1},}}")
_SPACE, _OTHER = re.compile(r"\s"), re.compile(r"\S")


def special_tokens(n_ranks: int, *, version_3_0: bool = False, count: int = N_SPECIAL) -> SpecialTokens:
    """Return the special block that follows `n_ranks` ordinary tokens, as Llama 3.1 names it, or 3.0.

    count: tokens in the block; a small vocabulary keeps fewer of those in reserve.
    """
    names = _NAMES_3_0 if version_3_0 else _NAMES_3_1
    ids: dict[str, int] = {}
    reserved = 0
    for offset in range(count):
        if offset in names:
            text = names[offset]
        else:
            text, reserved = f"reserved_special_token_{reserved}", reserved + 1
        ids[f"<|{text}|>"] = n_ranks + offset
    pad = None if version_3_0 else "<|finetune_right_pad_id|>"
    return SpecialTokens(ids, bos="<|begin_of_text|>", eos="<|end_of_text|>", pad=pad, adds_bos=True)


class TiktokenTokenizer(Tokenizer):
    """Llama 3's vocabulary in a `tiktoken.Encoding`."""

    def __init__(
        self, ranks: Mapping[bytes, int], special: SpecialTokens, chat_template: ChatTemplate | None = None
    ) -> None:
        super().__init__(special, chat_template)
        self.ranks = dict(ranks)
        # No special tokens are given to tiktoken: it must never see one in plain text.
        self._encoding = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=self.ranks, special_tokens={})

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.special_ids)

    def _encode_plain(self, segments: Sequence[str], at_start: Sequence[bool]) -> list[list[int]]:
        parts = [self.parts_of(segment) for segment in segments]
        flat = list(itertools.chain.from_iterable(parts))
        if len(flat) > _FEW:
            encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=usable_threads()))
        else:
            encoded = map(self._encoding.encode_ordinary, flat)
        return [next(encoded) if len(row) == 1 else [i for _ in row for i in next(encoded)] for row in parts]

    def parts_of(self, text: str) -> list[str]:
        return _cut(text) if len(text) > _MAX_TEXT or _may_have_long_run(text) else [text]

    def _token_table(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, i in self.ranks.items():
            table[i] = token
        for text, i in self.special_ids.items():
            table[i] = text.encode()
        return table

    def _identity(self) -> bytes:
        return _tiktoken_file(self.ranks)

    def to_backend(self) -> Backend:
        """Return the same vocabulary as a `tokenizers` pipeline, for tokenizer.json and GGUF."""
        merges = merges_of(self.ranks)
        spelled = {byte_level_text(token): i for token, i in self.ranks.items()}
        backend = Backend(models.BPE(vocab=spelled, merges=merges, ignore_merges=True))
        split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special_ids])
        return with_bos(backend, self.special)

    def save(self, directory: str | Path) -> None:
        files.write_tokenizer(as_path(directory), self.to_backend(), self.special, self.chat_template)
        (as_path(directory) / "tokenizer.model").write_bytes(_tiktoken_file(self.ranks))


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Return the merges, in byte-level spelling and in order, that build each token from every pair that can."""
    pairs = (pair for token in sorted(ranks, key=ranks.__getitem__) for pair in merges_into(token, ranks))
    return [(byte_level_text(left), byte_level_text(right)) for left, right in pairs]


def is_tiktoken_file(path: Path) -> bool:
    """Whether the file's first line is "base64 rank" (a SentencePiece model is binary)."""
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", file.readline(4096)) is not None


def load_tiktoken_model(path: Path) -> Tokenizer:
    """Load Llama 3's tokenizer.model; a params.json beside it without `use_scaled_rope` marks version 3.0."""
    ranks = _read_ranks(path)
    params = Fields(files.read_json(path.parent / "params.json"), str(path.parent / "params.json"))
    version_3_0 = len(params) > 0 and not params.flag("use_scaled_rope", False)
    left = params.whole("vocab_size", -1, least=-1) - len(ranks)  # Meta's files say -1 where the tokenizer decides
    count = left if 0 < left < N_SPECIAL else N_SPECIAL
    special = special_tokens(len(ranks), version_3_0=version_3_0, count=count)
    defaults = {"bos": special.bos, "eos": special.eos, "pad": special.pad}
    declared = files.read_declared(path.parent, {role: text for role, text in defaults.items() if text})
    if not all(_is_known(token, special, i) for i, token in declared.placed.items()) or not all(
        _is_known(token, special, special.ids.get(text)) for text, token in declared.named.items()
    ):
        return _with_declared(ranks, special, declared)
    roles = {role: declared.roles.get(role) for role in files.ROLES}
    adds_bos = files.read_flag(path.parent, "add_bos_token", True)
    special = replace(special, stops=files.read_stops(path.parent), adds_bos=adds_bos, **roles)  # type: ignore[arg-type]
    return TiktokenTokenizer(ranks, special, files.read_chat_template(path.parent, special))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token of a tokenizer.model; raises CheckpointError where ranks or bytes are missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}, line {number}: not 'base64 rank' ({error}); fetch the file again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: its {len(ranks)} ranks are not 0, 1, 2, ...; the file is cut or damaged")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(f"{path}: the byte {lacking[0]:#04x} has no rank of its own; the file is cut or damaged")
    return ranks


def _is_known(token: AddedToken, special: SpecialTokens, token_id: int | None) -> bool:
    """Whether a declared token is one of the special block, which takes up no white space and is found as it is."""
    flags = token.lstrip or token.rstrip or token.single_word or token.normalized or not token.special
    return token_id is not None and special.ids.get(token.content) == token_id and not flags


def _with_declared(ranks: Mapping[bytes, int], own: SpecialTokens, declared: files.Declared) -> HfTokenizer:
    """Return a pipeline with what the files beside declare: other names in Meta's block, flags, further tokens."""
    names = {i: text for text, i in own.ids.items()}
    names |= {i: token.content for i, token in declared.placed.items() if i >= len(ranks)}
    ids = {text: i for i, text in sorted(names.items())}
    if len(ids) < len(names):
        twice = next(text for i, text in names.items() if ids[text] != i)
        raise CheckpointError(
            f"{declared.directory}: {twice!r} is declared as another token than Llama 3 has it; mend {files.CONFIG}"
        )
    backend = TiktokenTokenizer(ranks, SpecialTokens(ids)).to_backend()
    adds_bos = files.read_flag(declared.directory, "add_bos_token", True)
    special = files.special_tokens_of(files.add_declared(backend, declared), declared, adds_bos)
    return HfTokenizer(with_bos(backend, special), special, files.read_chat_template(declared.directory, special))


def _tiktoken_file(ranks: Mapping[bytes, int]) -> bytes:
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)


def _may_have_long_run(text: str) -> bool:
    """Whether `_LONG_RUN` may match, at a fraction of its cost: a run that long covers a multiple of _MAX_RUN."""
    for at in range(_MAX_RUN, len(text), _MAX_RUN):
        other = _OTHER if text[at].isspace() else _SPACE
        before = other.search(text[at - _MAX_RUN : at][::-1])
        after = other.search(text, at, at + _MAX_RUN + 1)
        if before is None or after is None or before.start() + after.start() - at > _MAX_RUN:
            return True
    return False


def _cut(text: str) -> list[str]:
    parts = []
    for start in range(0, len(text), _MAX_TEXT):
        chunk = text[start : start + _MAX_TEXT]
        cuts = [0]
        for run in _LONG_RUN.finditer(chunk):
            cuts += range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)
        parts += [chunk[a:b] for a, b in zip(cuts, [*cuts[1:], len(chunk)], strict=True)]
    return parts
