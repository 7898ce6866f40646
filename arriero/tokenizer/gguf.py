"""The tokenizer that a GGUF file carries in its metadata, both ways.

`tokenizer.ggml.model` names the kind: "gpt2" is byte-level BPE with merges, where `tokenizer.ggml.pre` names the rule
that splits text first; "llama" is SentencePiece, given by pieces and scores. Reading builds the `tokenizers` pipeline
or the SentencePiece model that these describe; writing states the same for llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError, did_you_mean
from arriero.tokenizer.base import SpecialTokens, Tokenizer
from arriero.tokenizer.chat import ChatTemplate
from arriero.tokenizer.files import role_texts
from arriero.tokenizer.hf import HfTokenizer, with_bos

# Token types of the format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_ROLE_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_END_KEYS = ("eot", "eom")


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# name in the file -> how text is split before merging. Names not here are refused: a wrong split gives wrong ids.
PRE_TOKENIZERS = {
    "smollm": _digits_then_gpt2,
    "starcoder": _digits_then_gpt2,
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _split_then_bytes(LLAMA3_SPLIT),
    "llama3": lambda: _split_then_bytes(LLAMA3_SPLIT),
    "llama-v3": lambda: _split_then_bytes(LLAMA3_SPLIT),
    "qwen2": lambda: _split_then_bytes(QWEN2_SPLIT),
}
# Llama 3's vocabulary holds words that its merges cannot build; they are looked up whole first.
_WHOLE_WORDS = frozenset(["llama-bpe", "llama3", "llama-v3"])


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer out of a .gguf file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable GGUF file ({error})") from error
    fields = {name: f.contents() for name, f in reader.fields.items() if name.startswith("tokenizer.")}
    return tokenizer_from_gguf(fields)


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata (plain Python values) describes.

    Raises CheckpointError where there is none, or where its kind or pre-tokenizer is unknown.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level_from(fields)
    if kind == "llama":
        from arriero.tokenizer.sentencepiece import tokenizer_from_pieces

        return tokenizer_from_pieces(fields, _special_tokens(fields), _template(fields))
    if kind is None:
        raise CheckpointError("the GGUF metadata holds no tokenizer (no tokenizer.ggml.model); convert the model again")
    raise CheckpointError(
        f"tokenizer.ggml.model is {kind!r}; Arriero reads 'gpt2' and 'llama' (Llama-family) tokenizers"
    )


def _byte_level_from(fields: Mapping[str, Any]) -> HfTokenizer:
    pre = fields.get("tokenizer.ggml.pre", "missing")
    if pre not in PRE_TOKENIZERS:
        known = sorted(PRE_TOKENIZERS)
        raise CheckpointError(
            f"tokenizer.ggml.pre is {pre!r}, a way of splitting text that Arriero does not know (it knows "
            f"{', '.join(known)}){did_you_mean(pre, known)}; load the tokenizer from the model's Hugging Face directory"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(
            f"the GGUF vocabulary holds {len(tokens) - len(vocabulary)} tokens twice; convert it again"
        )
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    special = _special_tokens(fields)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if i in special.ids.values():
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    return HfTokenizer(with_bos(backend, special), special, _template(fields))


def _special_tokens(fields: Mapping[str, Any]) -> SpecialTokens:
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", [])
    roles = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLE_KEYS.items()}
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS]
    named = {role: tokens[i] for role, i in roles.items() if i is not None and i < len(tokens)}
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL}
    ids |= {text: roles[role] for role, text in named.items()}
    return SpecialTokens(
        ids=dict(sorted(ids.items(), key=lambda item: item[1])),
        stop=frozenset(tokens[i] for i in ends if i is not None),
        # llama.cpp adds bos to a SentencePiece vocabulary that does not say otherwise
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama")),
        **named,
    )


def _template(fields: Mapping[str, Any]) -> ChatTemplate | None:
    source = fields.get("tokenizer.chat_template")
    return None if source is None else ChatTemplate(source, role_texts(_special_tokens(fields)))
