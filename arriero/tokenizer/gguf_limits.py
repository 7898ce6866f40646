"""Features of a tokenizer that a GGUF file cannot express, so that llama.cpp will give other ids: each is warned of.

A GGUF file holds tokens, scores or merges, types and a name for the rule that splits text. llama.cpp's BPE has no
normaliser, its SentencePiece only writes spaces as "▁" (with one before a text and after every special token, or none),
and both match added tokens exactly as written (llama-vocab.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.hf import SPACE_MARKER, HfTokenizer
from arriero.tokenizer.sentencepiece import SentencePieceTokenizer

_FLAGS = {"lstrip": "take the white space before them", "rstrip": "take the white space after them",
          "single_word": "are matched as whole words only"}  # fmt: skip
_SPACES = [
    {"type": "Prepend", "prepend": SPACE_MARKER},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARKER},
]


def differences(tokenizer: Tokenizer) -> list[str]:
    """One phrase for each difference that the tokenizer's files call for; none for most models."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return list(_of_sentencepiece(tokenizer))
    if isinstance(tokenizer, HfTokenizer):
        return list(_of_pipeline(tokenizer, json.loads(tokenizer.backend.to_str())))
    return []


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Iterator[str]:
    if tokenizer.normalises:
        yield "text is normalised before it is split (nfkc or the like), which llama.cpp does not"
    if tokenizer.collapses_spaces:
        yield "repeated spaces are one (remove_extra_whitespaces), which llama.cpp keeps"


def _of_pipeline(tokenizer: HfTokenizer, state: Mapping[str, Any]) -> Iterator[str]:
    yield from _of_steps(tokenizer, state)
    if tokenizer.prefix_rule == "first":
        yield "a space goes before the first text only; llama.cpp puts one after every special token, too"
    if not tokenizer.byte_level and not state["model"].get("byte_fallback"):
        yield "unknown characters are one unknown token; llama.cpp spells them in bytes where the vocabulary has those"
    if not tokenizer.byte_level and state["model"].get("ignore_merges"):
        yield "whole words are looked up first (ignore_merges), which llama.cpp does not for this kind"
    for flag, what in _FLAGS.items():
        texts = [entry["content"] for entry in state["added_tokens"] if entry[flag]]
        if texts:
            more = f" and {len(texts) - 4} more" if texts[4:] else ""
            yield f"{', '.join(map(repr, texts[:4]))}{more} {what} ({flag}), which llama.cpp does not know"


def _steps(component: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a component, which is none, one or a sequence."""
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [dict(component)]


def _of_steps(tokenizer: HfTokenizer, state: Mapping[str, Any]) -> Iterator[str]:
    """Normalizers and pre-tokenizers; byte-level pre-tokenizers have names, or are refused (`tokenizer_to_gguf`)."""
    steps = _steps(state["normalizer"], "normalizers")
    if not tokenizer.byte_level:
        steps = [step for step in steps if step not in _SPACES]
        for step in _steps(state["pre_tokenizer"], "pretokenizers"):
            if step["type"] != "Metaspace" or step.get("replacement", SPACE_MARKER) != SPACE_MARKER:
                yield f"text is split first by {step['type']}, and llama.cpp does not split it"
            elif step.get("split", True):
                yield "text is split at spaces first (Metaspace), and llama.cpp merges across them"
    if steps:
        names = ", ".join(step["type"] for step in steps)
        yield f"text is normalised by {names} before it is split; llama.cpp leaves it as it is"
