"""Grown vocabularies: old ids keep their meaning, new merges are those of byte-pair encoding gone on."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from helpers.tokenizers import hard_strings, python_source, small_sentencepiece, well_formed
from transformers import AutoTokenizer

from arriero.errors import CheckpointError, DataError
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.tokenizer.extend import backend_of, extend
from arriero.tokenizer.gguf import tokenizer_from_gguf, tokenizer_to_gguf
from arriero.tokenizer.parallel import DocumentEncoder
from arriero.tokenizer.train import learn_llama3


@pytest.fixture(scope="module")
def tiktoken_base() -> Tokenizer:
    return learn_llama3([python_source("argparse").encode()], 601, n_special=13)


@pytest.fixture(scope="module")
def bases(tiktoken_base, smollm2_gguf, tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("json")
    tiktoken_base.save(folder)
    return {
        "tiktoken": tiktoken_base,
        "its tokenizer.json": load_tokenizer(folder),
        "smollm2": load_tokenizer(smollm2_gguf),
    }


KINDS = ["tiktoken", "its tokenizer.json", "smollm2"]


@pytest.fixture(scope="module")
def text() -> str:
    return python_source("inspect", "typing")


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_keep_their_meaning_and_new_ones_come_after(bases, kind, text):
    base = bases[kind]
    grown = extend(base, [text], 211).tokenizer
    assert grown.vocab_size == base.vocab_size + 211
    assert [grown.token_bytes(i) for i in range(base.vocab_size)] == [
        base.token_bytes(i) for i in range(base.vocab_size)
    ]
    assert grown.special_ids == base.special_ids and grown.special == base.special
    assert grown.chat_template == base.chat_template
    new = [grown.token_bytes(i) for i in range(base.vocab_size, grown.vocab_size)]
    assert len(set(new)) == 211 and not set(new) & {base.token_bytes(i) for i in range(base.vocab_size)}
    assert len(grown.encode(text)) < 0.97 * len(base.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_new_tokens_have_the_same_ids_and_all_decode(bases, kind, text):
    base = bases[kind]
    grown = extend(base, [text], 211).tokenizer
    same = 0
    for string in hard_strings(2003):
        old, new = base.encode(string), grown.encode(string)
        assert grown.decode(new) == base.decode(old)
        if max(new, default=0) < base.vocab_size:
            assert new == old
            same += 1
    assert same > 501


def test_new_merges_are_byte_pair_encoding_gone_on(tiktoken_base, text):
    """Each new token joins a pair that was, at its turn, as frequent as any: counted again from the start each time."""
    base = tiktoken_base
    backend = backend_of(base)
    words = Counter(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    rows = [([t.value for t in backend.model.tokenize(word)], n) for word, n in words.items()]
    grown = extend(base, [text], 61).tokenizer
    for i in range(base.vocab_size, base.vocab_size + 61):
        spelled = grown.backend.id_to_token(i)
        pairs: Counter[tuple[str, str]] = Counter()
        for row, n in rows:
            for pair in itertools.pairwise(row):
                pairs[pair] += n
        best = max(pairs.values())
        pair = next(p for p, n in pairs.items() if n == best and p[0] + p[1] == spelled)  # fails if it was no best pair
        for row, _ in rows:
            k = 0
            while k < len(row) - 1:
                if (row[k], row[k + 1]) == pair:
                    row[k : k + 2] = [spelled]
                k += 1


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_what_the_base_would_have_used(bases, kind, text):
    base = bases[kind]
    extension = extend(base, [text], 101)
    assert list(extension.parts) == list(range(base.vocab_size, base.vocab_size + 101))
    for i, ids in extension.parts.items():
        data = extension.tokenizer.token_bytes(i)
        assert b"".join(map(base.token_bytes, ids)) == data and len(ids) > 1
        if data.startswith(b" ") and data[1:].isalpha():  # one word, whatever the splitting
            assert base.encode(data.decode()) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_tokenizer_is_read_by_transformers_and_through_gguf(bases, kind, text, tmp_path):
    grown = extend(bases[kind], [text], 101).tokenizer
    grown.save(tmp_path)
    strings = hard_strings(1009)
    ids = grown.encode_batch(strings)
    assert load_tokenizer(tmp_path).encode_batch(strings) == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [well_formed(s) for s in strings]
    assert theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [grown.encode_rendered(s) for s in strings]
    assert tokenizer_from_gguf(tokenizer_to_gguf(grown)).encode_batch(strings) == ids
    assert [row.tolist() for row in DocumentEncoder(grown).encode(strings)] == ids


def test_growing_is_the_same_whichever_form_the_base_is_in(bases, text):
    one, other = (extend(bases[kind], [text], 101) for kind in ("tiktoken", "its tokenizer.json"))
    assert one.parts == other.parts
    assert one.tokenizer.encode(text) == other.tokenizer.encode(text)


def test_what_cannot_be_grown_is_refused(tiktoken_base):
    with pytest.raises(CheckpointError, match=r"only byte-level BPE .* this tokenizer is of another kind"):
        extend(small_sentencepiece(), ["some text"], 3)
    with pytest.raises(DataError, match=r"holds only \d+ new tokens that occur at least twice, 5,000 are asked for"):
        extend(tiktoken_base, ["llamas hum, llamas hum"], 5000)
