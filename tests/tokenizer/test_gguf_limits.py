"""What llama.cpp will do otherwise than the tokenizer's files say is told before a GGUF file is written."""

import json

import pytest
import sentencepiece
from helpers.tokenizers import small_sentencepiece, train_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from arriero.errors import CheckpointError
from arriero.tokenizer.base import SpecialTokens
from arriero.tokenizer.gguf import PRE_TOKENIZERS, tokenizer_from_gguf, tokenizer_to_gguf
from arriero.tokenizer.gguf_limits import differences
from arriero.tokenizer.hf import HfTokenizer, byte_level_alphabet
from arriero.tokenizer.sentencepiece import load_sentencepiece_model


def byte_level(*, normalizer=None, added=(), pre=PRE_TOKENIZERS["gpt-2"], **model):
    """Single bytes, "<|end|>", and what is added."""
    letters = list(byte_level_alphabet().values())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], **model))
    backend.pre_tokenizer, backend.decoder = pre(), decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False), *added])
    ids = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return HfTokenizer(backend, SpecialTokens(ids, eos="<|end|>"))


def marked(*, normalizer=None, pre=None, byte_fallback=True):
    """SentencePiece's kind as a pipeline: bytes and "▁"."""
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    )
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")] if pre is None else []
    backend.normalizer = normalizers.Sequence([*([normalizer] if normalizer else []), *steps])
    if pre is not None:
        backend.pre_tokenizer = pre
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    return HfTokenizer(backend, SpecialTokens({"<unk>": 0, "</s>": 1}, eos="</s>", unk="<unk>"))


def added(text, **flags):
    return AddedToken(text, special=True, normalized=False, **flags)


METASPACE = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
SAID = {
    "nothing, byte-level": (byte_level, {}, []),
    "nothing, marked": (marked, {}, []),
    "nothing, Metaspace": (marked, {"pre": METASPACE}, []),
    "NFC": (byte_level, {"normalizer": normalizers.NFC()}, ["text is normalised by NFC before it is split"]),
    "two steps": (
        byte_level,
        {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])},
        ["text is normalised by NFKC, Lowercase before it is split"],
    ),
    "NFKC, marked": (marked, {"normalizer": normalizers.NFKC()}, ["text is normalised by NFKC before it is split"]),
    "strips": (
        byte_level,
        {"added": [added("<|a|>", rstrip=True), added("<|b|>", lstrip=True, single_word=True)]},
        ["'<|b|>' take the white space before", "'<|a|>' take the white space after", "'<|b|>' are matched as whole"],
    ),
    "many": (
        byte_level,
        {"added": [added(f"<|{i}|>", rstrip=True) for i in range(7)]},
        ["'<|0|>', '<|1|>', '<|2|>', '<|3|>' and 3 more take"],
    ),
    "split at spaces": (
        marked,
        {"pre": pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)},
        ["text is split at spaces first (Metaspace), and llama.cpp merges across them"],
    ),
    "digits": (
        marked,
        {"pre": pre_tokenizers.Sequence([METASPACE, pre_tokenizers.Digits(True)])},
        ["text is split first by Digits"],
    ),
    "first only": (
        marked,
        {"pre": pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)},
        ["a space goes before the first text only"],
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_each_difference_is_told(name):
    make, settings, expected = SAID[name]
    told = differences(make(**settings))
    assert len(told) == len(expected)
    assert all(text.startswith(beginning) for text, beginning in zip(told, expected, strict=True))


def test_sentencepiece_models_say_theirs(tmp_path):
    assert differences(small_sentencepiece()) == []
    assert differences(load_sentencepiece_model(train_sentencepiece(tmp_path, 400))) == []
    for kind, name in (("bpe", "nfkc"), ("unigram", "identity")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a llama is an animal that hums"] * 9), model_prefix=str(tmp_path / kind),
            vocab_size=290 if kind == "bpe" else 300, model_type=kind, byte_fallback=True, normalization_rule_name=name,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    first, second = differences(load_sentencepiece_model(tmp_path / "bpe.model"))
    assert first.startswith("text is normalised before it is split (nfkc or the like)")
    assert second.startswith("repeated spaces are one (remove_extra_whitespaces)")
    fields = tokenizer_to_gguf(load_sentencepiece_model(tmp_path / "bpe.model"))
    assert fields["tokenizer.ggml.remove_extra_whitespaces"] is True
    assert tokenizer_from_gguf(fields).collapses_spaces
    with pytest.raises(CheckpointError, match=r"SentencePiece's unigram model; .* would give other ids: convert to hf"):
        tokenizer_to_gguf(load_sentencepiece_model(tmp_path / "unigram.model"))


def test_ways_of_splitting_without_a_name_in_llama_cpp_are_refused():
    other = byte_level(pre=lambda: pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(CheckpointError, match=r"way of splitting text is not known .*add_prefix_space.* convert to hf"):
        tokenizer_to_gguf(other)
    with pytest.raises(CheckpointError, match="way of splitting text is not known"):
        tokenizer_to_gguf(byte_level(ignore_merges=True))


def test_ends_that_llama_cpp_does_not_know_by_their_text_are_written(caplog):
    names = ["<|im_end|>", "<|done|>", "<|over|>", "<|out|>"]
    tokenizer = byte_level(added=[added(name) for name in names])
    ids = [tokenizer.special_ids[name] for name in names]
    tokenizer.__dict__["stop_ids"] = frozenset([tokenizer.eos_id, *ids[:3]])
    fields = tokenizer_to_gguf(tokenizer)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert (fields["tokenizer.ggml.eot_token_id"], fields["tokenizer.ggml.eom_token_id"]) == (ids[1], ids[2])
    assert caplog.messages == []
    tokenizer.__dict__["stop_ids"] = frozenset([tokenizer.eos_id, *ids])
    tokenizer_to_gguf(tokenizer)
    assert caplog.messages == [f"a GGUF file names 3 ends of a turn; llama.cpp will not stop at the ids [{ids[3]}]"]


@pytest.mark.parametrize("ends", [False, True])
def test_an_eos_that_the_pipeline_adds_is_written_in_both_layouts(ends, tmp_path):
    tokenizer = byte_level()
    if ends:
        tokenizer.backend.post_processor = processors.TemplateProcessing(
            single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_id)]
        )
    fields = tokenizer_to_gguf(tokenizer)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (False, ends)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs("a").input_ids[-1] == tokenizer.eos_id) is ends
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_eos_token"] is ends
