"""Learns a vocabulary from text: of Llama 3's kind (byte-level BPE) or Llama 1 and 2's (SentencePiece BPE).

Text is streamed, and a sample of it is used (sample.py), of which one hundredth is held out to measure on.

Llama 3's kind is learned by rustbpe: the merges that `tokenizers` learns (equal bytes per token to six digits), in a
quarter of its time and half its memory. Llama 1 and 2's kind is defined, and learned, by the sentencepiece library.

Price: the sample in memory; rustbpe adds its distinct words (75 MB for 20 MB of prose and code), sentencepiece 12 bytes
for each byte of the sample. Learning 32K tokens from 20 MB takes 2 to 5 seconds, on one core.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from arriero.errors import ConfigError, DataError, UserError, require
from arriero.io.files import write_json
from arriero.show.progress import counting, progress
from arriero.tokenizer.base import SpecialTokens, Tokenizer
from arriero.tokenizer.compare import measure, vocabulary_statistics
from arriero.tokenizer.llama3 import N_SPECIAL, SPLIT, TiktokenTokenizer, special_tokens
from arriero.tokenizer.named_templates import builtin_template
from arriero.tokenizer.sample import CHUNK, Sample, draw_sample
from arriero.tokenizer.sentencepiece import SentencePieceTokenizer
from arriero.version import __version__

Kind = Literal["llama3", "llama2"]

LARGEST_VOCABULARY = 2**24
N_NAMED = 11  # the last named token of the special block is at offset 10
REPORT = "report.json"

_TEMPLATES = {"llama3": "llama3.1", "llama2": "llama2"}


@dataclass(frozen=True)
class TrainingConfig:
    """What is learned."""

    kind: Kind = "llama3"
    """llama3: byte-level BPE with Llama 3's split pattern and special block; llama2: SentencePiece BPE."""
    vocab_size: int = 32_000
    """Ids in all, special tokens included; Llama 2 has 32,000, Llama 3 128,256 (128,000 and 256)."""
    n_special: int = N_SPECIAL
    """Special tokens of llama3, reserved ones included; fewer leave a small vocabulary more words."""
    sample: int = 256_000_000
    """Bytes of text to learn from, at most."""

    def __post_init__(self) -> None:
        if self.kind not in _TEMPLATES:
            raise ConfigError(f"kind is {self.kind!r}; known are llama3 and llama2")
        if self.kind == "llama3" and not N_NAMED <= self.n_special <= N_SPECIAL:
            raise ConfigError(
                f"n_special is {self.n_special}; Llama 3's named tokens need {N_NAMED}, its block has {N_SPECIAL}"
            )
        least = 256 + (self.n_special if self.kind == "llama3" else 3) + 1
        if self.vocab_size < least:
            fewer = "" if self.kind == "llama2" else ", or give a smaller n_special"
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; the bytes and special tokens alone take {least - 1}: "
                f"give at least {least}{fewer}"
            )
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; the largest that is trained here has {LARGEST_VOCABULARY:,}"
            )
        if self.sample < 1:
            raise ConfigError(f"sample is {self.sample}; give a positive number of bytes")


def learn_llama3(training: Iterable[bytes], vocab_size: int, n_special: int = N_SPECIAL) -> TiktokenTokenizer:
    """Learn byte-level BPE: `vocab_size - n_special` ranks, the 256 bytes first, then the special block.

    Raises DataError where the text has not that many merges in it.
    """
    rustbpe = require("rustbpe", "data")
    learner = rustbpe.Tokenizer()
    n_ranks = vocab_size - n_special
    # Few at a time: the buffer is the whole of what is in memory beside the counts of words.
    learner.train_from_iterator((data.decode() for data in training), n_ranks, buffer_size=64, pattern=SPLIT)
    ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
    if len(ranks) < n_ranks:
        raise DataError(
            f"the text holds only {len(ranks):,} different tokens, {n_ranks:,} are asked for (and {n_special} special "
            f"ones): give more text, or a vocab_size of at most {len(ranks) + n_special}"
        )
    return TiktokenTokenizer(ranks, special_tokens(n_ranks, count=n_special))


def learn_llama2(training: Iterable[bytes], vocab_size: int) -> SentencePieceTokenizer:
    """Learn SentencePiece BPE with Llama 1 and 2's settings (those in the published model's header).

    Raises DataError where the library cannot make a vocabulary of that size from the text.
    """
    model = io.BytesIO()
    lines = (line for data in training for line in data.decode().split("\n") if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=16,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            max_sentence_length=8 * CHUNK,  # bytes; the library would drop longer lines without a word
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = _reason(str(error))
        raise DataError(f"sentencepiece cannot learn {vocab_size:,} pieces from this text: {reason}") from error
    special = SpecialTokens({"<unk>": 0, "<s>": 1, "</s>": 2}, bos="<s>", eos="</s>", unk="<unk>", adds_bos=True)
    return SentencePieceTokenizer(model.getvalue(), special)


def _reason(message: str) -> str:
    """The reason in a message of sentencepiece, and the remedy in our terms for the two common reasons."""
    if few := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"its characters, the bytes and special tokens take {few[1]}; give a vocab_size of at least that"
    if most := re.search(r"set it to a value <= (\d+)", message):
        return f"it gives {most[1]}; give more text, or a vocab_size of at most {most[1]}"
    # "Internal: trainer.cc(670) [condition] text": the place in its source is of no help
    return f"{message.rsplit('] ', 1)[-1].strip().rstrip('.') or message}; give more text, or another vocab_size"


def learn(sample: Sample, config: TrainingConfig) -> Tokenizer:
    """Learn from a sample, and give the tokenizer the chat template of its kind."""
    tokenizer: Tokenizer
    if config.kind == "llama3":
        tokenizer = learn_llama3(sample.training, config.vocab_size, config.n_special)
    else:
        tokenizer = learn_llama2(sample.training, config.vocab_size)
    assert tokenizer.vocab_size == config.vocab_size
    tokenizer.chat_template = builtin_template(_TEMPLATES[config.kind], tokenizer)
    return tokenizer


def train(texts: Iterable[str], config: TrainingConfig, directory: Path) -> dict[str, Any]:
    """Learn a tokenizer from a stream of texts, write it into `directory`, and return the report, written there too.

    What is written: tokenizer.json with its sidecar files, and tokenizer.model in the kind's native form.
    """
    if config.kind == "llama3":
        require("rustbpe", "data")  # before the reading, not after it
    began = time.perf_counter()
    with counting("reading") as count:
        sample = draw_sample(texts, config.sample, count)
    read = time.perf_counter()
    with progress(f"learning {config.vocab_size:,} tokens from {sample.training_bytes / 1e6:,.1f} MB"):
        tokenizer = learn(sample, config)
    learned = time.perf_counter()
    tokenizer.save(directory)
    held_out = [data.decode() for data in sample.held_out]
    report = {
        "arriero": __version__,
        "kind": config.kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": len(tokenizer.special_ids),
        "fingerprint": tokenizer.fingerprint,
        "text": {
            "documents": sample.n_documents,
            "bytes": sample.n_bytes,
            "learned_from_bytes": sample.training_bytes,
            "held_out_bytes": sum(map(len, sample.held_out)),
            "held_out_was_learned_from": sample.held_out == sample.training,
        },
        "held_out": measure(tokenizer, held_out).as_dict(),
        "vocabulary": vocabulary_statistics(tokenizer, held_out),
        "seconds": {"read": round(read - began, 2), "learn": round(learned - read, 2)},
    }
    write_json(directory / REPORT, report)
    return report


def check_empty(out: Path, force: bool) -> None:
    """Refuse to write where a file is, or without `force` where a directory holds something."""
    if out.exists() and not out.is_dir():  # a file, or a device
        raise UserError(f"{out}: is a file, and a directory is to be written; choose another name")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UserError(f"{out}: exists already; choose another name, or give --force to write over it")
