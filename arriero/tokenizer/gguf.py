"""The tokenizer in a GGUF file's metadata, read and written.

`tokenizer.ggml.model` is the kind: "gpt2" is byte-level BPE with merges, where `tokenizer.ggml.pre` names the rule that
splits text first; "llama" is SentencePiece, given by pieces and scores. Reading builds the `tokenizers` pipeline or the
SentencePiece model that these describe; writing states the same for llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from arriero.errors import CheckpointError, did_you_mean
from arriero.io.gguf_header import read_metadata
from arriero.io.reading import reading
from arriero.show.terminal import warn_once
from arriero.tokenizer import llama3
from arriero.tokenizer.base import END_TOKENS, SpecialTokens, Tokenizer
from arriero.tokenizer.files import adds_eos, chat_template
from arriero.tokenizer.hf import HfTokenizer, with_bos
from arriero.tokenizer.sentencepiece import (  # a token's type has the same number in a GGUF file
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    SentencePieceTokenizer,
    pieces_of,
    tokenizer_from_pieces,
)
from arriero.tokenizer.template import DEFAULT, ChatTemplate
from arriero.tokenizer.vocabulary import QWEN2_SPLIT

_ROLE_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_END_KEYS = ("eot", "eom")
# What llama.cpp has under "tokenizer.ggml.": types of entries, and of the items of lists.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("model", "pre"), str),
    **dict.fromkeys((f"{key}_token_id" for key in (*_ROLE_KEYS.values(), *_END_KEYS)), int),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"), bool),
}
_ITEMS: dict[str, type] = {"tokens": str, "merges": str, "token_type": int, "scores": float}
_WORDS = {str: "text", int: "whole number", bool: "true or false", float: "number"}
_TEMPLATE = "tokenizer.chat_template"


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
    "llama-bpe": lambda: _split_then_bytes(llama3.SPLIT),
    "llama3": lambda: _split_then_bytes(llama3.SPLIT),
    "llama-v3": lambda: _split_then_bytes(llama3.SPLIT),
    "qwen2": lambda: _split_then_bytes(QWEN2_SPLIT),
}
# Llama 3's vocabulary holds words that its merges cannot build; they are looked up whole first.
_WHOLE_WORDS = frozenset(["llama-bpe", "llama3", "llama-v3"])


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer out of a .gguf file."""
    return tokenizer_from_gguf(read_metadata(path))


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata (plain Python values) describes.

    Raises CheckpointError where there is none, or where its kind or pre-tokenizer is unknown.
    """
    _check_types(fields)
    fields = _without_padding(fields)
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level_from(fields)
    if kind == "llama":
        special = _special_tokens(fields)
        return tokenizer_from_pieces(fields, special, _template(fields, special))
    if kind is None:
        raise CheckpointError("the GGUF metadata holds no tokenizer (no tokenizer.ggml.model); convert the model again")
    raise CheckpointError(
        f"tokenizer.ggml.model is {kind!r}; Arriero reads 'gpt2' and 'llama' (Llama-family) tokenizers"
    )


def _check_types(fields: Mapping[str, Any]) -> None:
    """Refuse metadata whose entries are of other types than llama.cpp's, or lists that differ in length."""
    prefix = "tokenizer.ggml."
    entries = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    for key, value in entries.items():
        kind, item = _TYPES.get(key), _ITEMS.get(key)
        if kind is not None and type(value) is not kind:
            raise CheckpointError(f"{prefix}{key} is {value!r:.60}, no {_WORDS[kind]}; convert the model to GGUF again")
        if item is not None and (type(value) is not list or not all(type(each) is item for each in value)):
            raise CheckpointError(
                f"{prefix}{key} is {value!r:.60}, no list of {_WORDS[item]}s; convert the model to GGUF again"
            )
    lengths = {key: len(entries[key]) for key in ("tokens", "token_type", "scores") if key in entries}
    if entries.get("model") in ("gpt2", "llama") and (not entries.get("tokens") or len(set(lengths.values())) > 1):
        found = ", ".join(f"{n:,} of {prefix}{key}" for key, n in lengths.items()) or "no tokens"
        raise CheckpointError(f"the GGUF vocabulary has {found}; each token has one of each: convert the model again")


def _without_padding(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out the unused tokens "[PAD261]", "[PAD262]" ... at the end, which converters write for padded rows."""
    tokens, types = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if tokens is None or types is None:
        return fields
    named = {value for key, value in fields.items() if key.endswith("_token_id")}
    n = len(tokens)
    while n and types[n - 1] == UNUSED and tokens[n - 1] == f"[PAD{n - 1}]" and n - 1 not in named:
        n -= 1
    lists = {f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores")}
    return fields if n == len(tokens) else {k: v[:n] if k in lists else v for k, v in fields.items()}


def _byte_level_from(fields: Mapping[str, Any]) -> HfTokenizer:
    pre = fields.get("tokenizer.ggml.pre", "missing")
    if pre not in PRE_TOKENIZERS:
        known = sorted(PRE_TOKENIZERS)
        raise CheckpointError(
            f"tokenizer.ggml.pre is {pre!r}, a way of splitting text that Arriero does not know (it knows "
            f"{', '.join(known)}){did_you_mean(pre, known)}; load the tokenizer from the model's Hugging Face directory"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    used = [i for i, token in enumerate(tokens) if (types[i : i + 1], token) != ([UNUSED], f"[PAD{i}]")]
    vocabulary = {tokens[i]: i for i in used}
    if len(vocabulary) != len(used):
        raise CheckpointError(f"the GGUF vocabulary holds {len(used) - len(vocabulary)} tokens twice; convert it again")
    with reading("the GGUF vocabulary", "its merges are not of its tokens", "convert the model again"):
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    special = _special_tokens(fields)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.ids])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in special.words])
    return HfTokenizer(with_bos(backend, special), special, _template(fields, special))


def _special_tokens(fields: Mapping[str, Any]) -> SpecialTokens:
    """Return the added tokens as llama.cpp reads them: control tokens are special, user-defined ones are words."""
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", [])
    roles = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLE_KEYS.items()}
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS]
    named = {role: tokens[i] for role, i in roles.items() if i is not None and 0 <= i < len(tokens)}
    kinds = {kind: {tokens[i]: i for i, k in enumerate(types) if k == kind} for kind in (CONTROL, USER_DEFINED)}
    ids: dict[str, int] = dict(kinds[CONTROL])
    ids |= {text: int(roles[role] or 0) for role, text in named.items() if text not in kinds[USER_DEFINED]}
    return SpecialTokens(
        ids=dict(sorted(ids.items(), key=lambda item: item[1])),
        words=kinds[USER_DEFINED],
        stops=frozenset(i for i in ends if i is not None and 0 <= i < len(tokens)),
        # llama.cpp adds bos to a SentencePiece vocabulary that does not say otherwise
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama")),
        **named,
    )


def _template(fields: Mapping[str, Any], special: SpecialTokens) -> ChatTemplate | None:
    """Read "tokenizer.chat_template", and those with a name of their own: "tokenizer.chat_template.NAME"."""
    named = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or DEFAULT: source
        for key, source in fields.items()
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    wrong = [name for name, source in named.items() if not isinstance(source, str)]
    if wrong:
        raise CheckpointError(f"the GGUF metadata's chat template {wrong[0]!r} is no text; convert the model again")
    return chat_template(named, special)


def tokenizer_to_gguf(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the metadata, plain Python values, from which llama.cpp reads a tokenizer of equal ids.

    Raises CheckpointError for a tokenizer that llama.cpp has no name for.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        _check_is_bpe(tokenizer.is_bpe, "SentencePiece's unigram model")
        fields = _pieces_to_gguf(tokenizer.pieces())
        if tokenizer.collapses_spaces:
            fields["tokenizer.ggml.remove_extra_whitespaces"] = True
    else:
        assert isinstance(tokenizer, (HfTokenizer, llama3.TiktokenTokenizer))
        backend = tokenizer.backend if isinstance(tokenizer, HfTokenizer) else tokenizer.to_backend()
        state = json.loads(backend.to_str())
        _check_is_bpe(state["model"]["type"] == "BPE", state["model"]["type"])
        byte_level = not isinstance(tokenizer, HfTokenizer) or tokenizer.byte_level
        fields = _byte_level_to_gguf(state) if byte_level else _pieces_to_gguf(pieces_of(state))
    special = tokenizer.special
    for role, key in _ROLE_KEYS.items():
        token_id = special.id_of(getattr(special, role))
        if token_id is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = token_id
    fields |= _ends(tokenizer)
    fields["tokenizer.ggml.add_bos_token"] = special.adds_bos
    fields["tokenizer.ggml.add_eos_token"] = isinstance(tokenizer, HfTokenizer) and adds_eos(tokenizer.backend, special)
    fields["tokenizer.ggml.add_space_prefix"] = tokenizer.prefix_rule != "never"
    if tokenizer.chat_template is not None:
        fields |= _templates_to_gguf(tokenizer.chat_template)
    return fields


def _check_is_bpe(is_bpe: bool, kind: str) -> None:
    if not is_bpe:
        raise CheckpointError(
            f"this tokenizer is {kind}; a GGUF file for a Llama holds BPE, as which llama.cpp would give other ids: "
            "convert to hf"
        )


def _ends(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that end a turn beside eos, where llama.cpp does not know them by their text."""
    known = {tokenizer.eos_id, *(tokenizer.added_ids.get(text) for text in END_TOKENS)}
    others = sorted(tokenizer.stop_ids - known)
    if lost := others[len(_END_KEYS) :]:
        warn_once(f"a GGUF file names {1 + len(_END_KEYS)} ends of a turn; llama.cpp will not stop at the ids {lost}")
    return {f"tokenizer.ggml.{key}_token_id": i for key, i in zip(_END_KEYS, others, strict=False)}


def _templates_to_gguf(template: ChatTemplate) -> dict[str, Any]:
    """Return the entries that gguf's `add_chat_template` writes: names, and each template under its own."""
    fields: dict[str, Any] = {} if template.source is None else {_TEMPLATE: template.source}
    names = [re.sub(r"[^A-Za-z0-9]", "_", name) for name in template.others]
    if len({DEFAULT, *names}) <= len(names):
        raise CheckpointError(
            f"two of the chat templates {', '.join(template.sources)} have one name in GGUF; rename one"
        )
    if names:
        fields[f"{_TEMPLATE}s"] = names
    return fields | {f"{_TEMPLATE}.{name}": s for name, s in zip(names, template.others.values(), strict=True)}


def _byte_level_to_gguf(state: Mapping[str, Any]) -> dict[str, Any]:
    splits = {name: _split_of(build()) for name, build in PRE_TOKENIZERS.items()}
    split = _without_offsets(state["pre_tokenizer"])
    whole_words = bool(state["model"].get("ignore_merges"))
    names = [n for n in PRE_TOKENIZERS if splits[n] == split and whole_words == (n in _WHOLE_WORDS)]
    if not names:
        raise CheckpointError(
            f"llama.cpp's name for this tokenizer's way of splitting text is not known ({json.dumps(split)[:200]}); "
            f"Arriero can export: {', '.join(sorted(PRE_TOKENIZERS))}. Under another name ids would differ: convert to "
            "hf, which keeps it"
        )
    tokens, types = _tokens_of(state)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
    }


def _tokens_of(state: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return tokens and types by id; ids that no token has are filled as llama.cpp's converter fills them."""
    vocabulary = {i: token for token, i in state["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    tokens, types = [], []
    for i in range(max([*vocabulary, *added]) + 1):
        if i in added:
            tokens.append(added[i]["content"])
            types.append(CONTROL if added[i]["special"] else USER_DEFINED)
        else:
            tokens.append(vocabulary.get(i, f"[PAD{i}]"))
            types.append(NORMAL if i in vocabulary else UNUSED)
    return tokens, types


def _pieces_to_gguf(pieces: Sequence[tuple[str, float, int]]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
    }


def _split_of(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Any:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    return _without_offsets(json.loads(backend.to_str())["pre_tokenizer"])


def _without_offsets(state: Any) -> Any:
    """Drop what only decides character offsets, so that pipelines that give equal ids compare equal."""
    if isinstance(state, dict):
        return {k: _without_offsets(v) for k, v in state.items() if k != "trim_offsets"}
    return [_without_offsets(v) for v in state] if isinstance(state, list) else state
