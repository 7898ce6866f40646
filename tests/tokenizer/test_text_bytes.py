"""Bytes of text by token: against the libraries' own offsets and alphabets."""

import numpy as np
import pytest
import tokenizers
import transformers
from helpers.tokenizers import small_sentencepiece

from arriero.tokenizer import load_tokenizer
from arriero.tokenizer.base import SpecialTokens
from arriero.tokenizer.hf import HfTokenizer

TEXTS = ["Hello Hi", " Hi", "  llama\r\n", "日本語 e\u0301 👍🏽 \u2028", "</s> <|endoftext|> <s>", "a", ""]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_have_the_bytes_of_their_letters(smollm2, tmp_path, text):
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = smollm2.encode(text)
    letters = theirs.convert_ids_to_tokens(ids)
    assert all(set(token) <= alphabet for token in letters)  # a letter a byte
    expected = [len(token) for token in letters]
    assert smollm2.text_bytes(ids).tolist() == expected and sum(expected) == len(text.encode())
    assert smollm2.text_bytes(ids, len(text.encode())).tolist() == expected


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_tokens_have_the_bytes_of_what_they_stand_for(text):
    ours = small_sentencepiece()
    ids = ours.encode(text)
    pieces = ours.processor.encode(text, return_type="proto").pieces
    if [piece.id for piece in pieces] == ids:  # not where a special token's text is broken up
        surfaces = [len(piece.surface.encode()) for piece in pieces]
        sizes = ours.text_bytes(ids, len(text.encode()))
        byte = np.array([ours.processor.is_byte(i) for i in ids], dtype=bool)
        assert sizes[~byte].tolist() == [n for n, b in zip(surfaces, byte, strict=True) if not b]
        assert (sizes[byte] == 1).all()  # the library gives all bytes of a character to its last
    assert ours.text_bytes(ids, len(text.encode())).sum() == len(text.encode())


def test_special_tokens_are_no_text(smollm2):
    ids = smollm2.encode("ab")
    sizes = smollm2.text_bytes([smollm2.bos_id, *ids, smollm2.eos_id], 2)
    assert sizes[0] == sizes[-1] == 0 and sizes.sum() == 2


def test_a_text_that_the_tokenizer_changes_has_its_own_bytes():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({chr(c): c - 97 for c in range(97, 123)}, []))
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    ours = HfTokenizer(backend, SpecialTokens({}))
    ids = ours.encode("ﬁve")  # a ligature of three bytes, which NFKC makes two letters
    assert len(ids) == 4 and ours.text_bytes(ids, 5).tolist() == [1.25] * 4
    assert ours.text_bytes([], 0).tolist() == [] and ours.text_bytes([], 3).tolist() == []
