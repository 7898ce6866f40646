"""Small tokenizers and texts that try to break them, for the tests of the tokenizer package."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from arriero.tokenizer.base import SpecialTokens
from arriero.tokenizer.hf import HfTokenizer
from arriero.tokenizer.named_templates import builtin_template
from arriero.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceTokenizer, write_model

ATOMS = [
    *["I'LL", "don't", "'s", "'S", "'ſ", "ſ", "K", "İ", "Hello", " the", "naïve", "e\u0301", "ﬁ", "x" * 37],
    *["👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "❤️‍🔥", "👍🏽", "🏴\U000e0067\U000e0062\U000e007f"],
    *["\u200d", "\ufeff", "\u202e", "\0", "\x04"],
    *["日本語", "한국어", "ไทย", "हिन्दी"],
    *["<s>", "</s>", "<unk>", "<|eot_id|>", "<|im_end|>", "<|begin_of_text|>", "<0x0A>", "▁", "Ġ", "�"],
    *["\ud83d", "\ude00", "\ud83d\ude00", "\ude00\ud83d", "\ud800a\udfff"],
]
SPACES = [" ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u0085", "\x0b", "\x1c", "\u2028", " \n"]


def python_source(*names: str) -> str:
    """Return standard-library modules, one after the other."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "".join((folder / f"{name}.py").read_text("utf-8") for name in names)


def hard_strings(n: int, seed: int = 7) -> list[str]:
    """Return n strings of Unicode blocks, code, white space, numbers, emoji, special-token text and decoded bytes."""
    rng = random.Random(seed)
    lines = python_source("argparse", "inspect", "pydoc_data/topics").splitlines(keepends=True)

    def block() -> str:
        start = rng.choice([rng.randrange(0x3000), rng.randrange(0x11000), rng.randrange(0x1F000, 0x20000)])
        points = (start + rng.randrange(160) for _ in range(rng.randrange(1, 20)))
        return "".join(chr(p) for p in points)

    kinds = [
        block,
        lambda: "".join(lines[(at := rng.randrange(len(lines) - 9)) : at + rng.randrange(1, 9)]),
        lambda: rng.choice(SPACES) * rng.randrange(1, 12),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        lambda: rng.choice(ATOMS),
        lambda: rng.randbytes(rng.randrange(9)).decode("utf-8", "replace"),
        lambda: rng.randbytes(rng.randrange(9)).decode("utf-8", "surrogateescape"),
    ]
    return ["".join(rng.choice(kinds)() for _ in range(rng.randrange(6))) for _ in range(n)]


def small_sentencepiece() -> SentencePieceTokenizer:
    """Return a vocabulary of bytes, nine letters and nine merges, one of which ends in "s>"."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    pieces += [(c, -1000.0, NORMAL) for c in "▁Hi</s>elo"]
    pieces += [
        (p, -float(k), NORMAL) for k, p in enumerate(["Hi", "▁Hi", "</", "s>", "▁▁", "ll", "He", "Hell", "Hello"])
    ]
    special = SpecialTokens({"<unk>": 0, "<s>": 1, "</s>": 2}, bos="<s>", eos="</s>", unk="<unk>", adds_bos=True)
    return SentencePieceTokenizer(write_model(pieces, {"unk": 0, "bos": 1, "eos": 2, "pad": -1}), special)


def small_byte_level() -> HfTokenizer:
    """Return the 256 bytes behind SmolLM2's first special tokens, with ChatML's template."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate([*names, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    special = SpecialTokens({name: i for i, name in enumerate(names)}, bos=names[1], eos=names[2])
    tokenizer = HfTokenizer(backend, special)
    tokenizer.chat_template = builtin_template("chatml", tokenizer)
    return tokenizer


def learned_byte_level(vocab_size: int) -> Backend:
    """Return the 256 bytes and the first merges of "llama", as the library learns them, without added tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["llama"], trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def train_sentencepiece(folder: Path, vocab_size: int) -> Path:
    """Train a model with Llama's settings by the library alone, and return its file."""
    (folder / "corpus.txt").write_text(python_source("argparse", "inspect", "pydoc_data/topics"), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=0.99995,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentencepiece_length=16,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def well_formed(text: str) -> str:
    """Return the text as tiktoken reads it, for references that refuse lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
