"""vocab.json and merges.txt: byte-level BPE as GPT-2 wrote it, before there was a tokenizer.json.

The two files say nothing of how text is split before merging; the class in tokenizer_config.json does, so a class whose
split is not known is refused: a wrong split gives wrong ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError
from arriero.io.reading import read_text, reading
from arriero.tokenizer import files, llama3
from arriero.tokenizer.hf import HfTokenizer, with_bos

VOCABULARY, MERGES = "vocab.json", "merges.txt"
QWEN2_SPLIT = llama3.SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_END = "<|endoftext|>"


class _Kind(NamedTuple):
    """What a class of transformers makes of the two files."""

    roles: dict[str, str]  # where tokenizer_config.json names none
    pipeline: Callable[[Backend, bool], None]
    plain_roles: bool  # whether tokens with a role lose their flags


def _gpt2(backend: Backend, prefix: bool) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)


def _qwen2(backend: Backend, prefix: bool) -> None:
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])


CLASSES = {
    "GPT2Tokenizer": _Kind({"bos": _END, "eos": _END, "unk": _END}, _gpt2, False),
    "Qwen2Tokenizer": _Kind({"eos": _END, "pad": _END, "unk": _END}, _qwen2, True),
}


def load_vocab_and_merges(directory: Path) -> HfTokenizer:
    """Read the tokenizer of a directory with vocab.json and merges.txt, as the class that it names builds it.

    Raises CheckpointError where the class is another, or where the files do not fit together.
    """
    kind = _kind_of(directory)
    vocabulary = _read_vocabulary(directory / VOCABULARY)
    merges = _read_merges(directory / MERGES)
    with reading(directory / MERGES, f"its merges do not fit {VOCABULARY}"):
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    kind.pipeline(backend, files.read_flag(directory, "add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    declared = files.read_declared(directory, kind.roles)
    roles = [AddedToken(text, special=True, normalized=False) for text in kind.roles.values() if text in vocabulary]
    backend.add_special_tokens(roles)
    files.add_declared(backend, declared)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for role, text in kind.roles.items():
        if text not in known and declared.roles[role] == text:  # the class's default, which this vocabulary lacks
            declared.roles[role] = None
    if kind.plain_roles:
        named = [text for text in (*declared.named, *kind.roles.values()) if text in known]
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in named])
    special = files.special_tokens_of(backend, declared, adds_bos=files.read_flag(directory, "add_bos_token", False))
    return HfTokenizer(with_bos(backend, special), special, files.read_chat_template(directory, special))


def _kind_of(directory: Path) -> _Kind:
    name = files.read_json(directory / files.CONFIG).get("tokenizer_class")
    if name is None and files.read_json(directory / "config.json").get("model_type") == "qwen3":
        name = "Qwen2Tokenizer"
    kind = CLASSES.get(str(name).removesuffix("Fast"))
    if kind is None:
        raise CheckpointError(
            f"{directory}: no tokenizer.json is there, and {VOCABULARY} with {MERGES} is read where {files.CONFIG} "
            f"names a tokenizer_class of {' or '.join(CLASSES)}; {name!r} does not say how text is split: fetch the "
            "model's tokenizer.json, or name the class"
        )
    return kind


def _read_vocabulary(file: Path) -> dict[str, int]:
    vocabulary = files.read_json(file)
    ids = list(vocabulary.values())
    if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
        raise CheckpointError(f"{file}: it must give every token a whole id of its own; fetch the file again")
    return vocabulary


def _read_merges(file: Path) -> list[tuple[str, str]]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; {VOCABULARY} is of no use without it")
    lines = read_text(file).split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.strip("\r ")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{file}, line {number}: {line!r:.60} is no pair of tokens; fetch the file again")
        merges.append((pair[0], pair[1]))
    return merges
