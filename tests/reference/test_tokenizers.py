"""Ids equal those of the libraries that define each format, on ten thousand strings that try to break them."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import time
from pathlib import Path

import pytest
import regex
import sentencepiece
import tiktoken
from helpers.tokenizers import hard_strings, train_sentencepiece, well_formed
from transformers import AutoTokenizer

from arriero.io.gguf_header import read_metadata
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.tokenizer.gguf import tokenizer_from_gguf, tokenizer_to_gguf
from arriero.tokenizer.hf import byte_level_text

N_STRINGS = 10_000


@pytest.fixture(scope="session")
def strings() -> list[str]:
    return hard_strings(N_STRINGS, seed=20_260_117)


def differing(ours: list[list[int]], theirs: list[list[int]], strings: list[str]) -> list[str]:
    assert len(ours) == len(theirs) == len(strings)
    return [s for a, b, s in zip(ours, theirs, strings, strict=True) if a != b][:3]


def plain_ids(reference, strings: list[str]) -> list[list[int]]:
    texts = [well_formed(s) for s in strings]
    return reference(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def parsed_ids(reference, strings: list[str]) -> list[list[int]]:
    return reference([well_formed(s) for s in strings], add_special_tokens=False)["input_ids"]


# Llama 3: Meta's own file ships inside Meta's own package.


@pytest.fixture(scope="session")
def llama3_file() -> Path:
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None and spec.submodule_search_locations, "llama-models is missing; run: make install"
    return Path(next(iter(spec.submodule_search_locations))) / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama3(llama3_file: Path) -> Tokenizer:
    return load_tokenizer(llama3_file)


@pytest.fixture(scope="session")
def metas(llama3_file: Path):
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer(llama3_file)


def test_llama3_gives_metas_ids_and_tiktokens(llama3, metas, strings):
    ours = llama3.encode_batch(strings)
    assert differing(ours, [metas.encode(s, bos=False, eos=False) for s in strings], strings) == []
    plain = tiktoken.Encoding(
        "x", pat_str=metas.pat_str, mergeable_ranks=metas.model._mergeable_ranks, special_tokens={}
    )
    assert differing(ours, plain.encode_ordinary_batch(strings), strings) == []
    assert [llama3.decode(ids) for ids in ours] == [metas.decode(ids) for ids in ours]
    assert [llama3.encode(s) for s in strings[:97]] == ours[:97]


def test_llama3_special_block_is_the_published_one(llama3, metas):
    assert llama3.vocab_size == metas.n_words == 128_256
    named = ["begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id"]
    named += ["eom_id", "eot_id", "python_tag", "reserved_special_token_0", "reserved_special_token_1"]
    for name in named:
        assert llama3.special_ids[f"<|{name}|>"] == metas.special_tokens[f"<|{name}|>"], name
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128_000, 128_001, 128_004)
    assert llama3.stop_ids == {128_001, 128_008, 128_009}
    assert sorted(llama3.special_ids.values()) == list(range(128_000, 128_256))


def test_llama3_published_vectors(llama3):
    sentence = [128_000, 2028, 374, 264, 1296, 11914, 13, 128_001]
    assert llama3.encode("This is a test sentence.", bos=True, eos=True) == sentence
    words = {"user": 882, "system": 9125, "assistant": 78_191, "\n\n": 271}
    assert {word: llama3.encode(word) for word in words} == {word: [i] for word, i in words.items()}
    assert llama3.encode("I'LL pay 1234567 dollars") == [40, 6, 4178, 2343, 220, 4513, 10_961, 22, 11_441]


def test_llama3_directory_that_we_write_gives_equal_ids_in_transformers(llama3, strings, tmp_path):
    llama3.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ours = llama3.encode_batch(strings)
    assert differing(ours, plain_ids(reference, strings), strings) == []
    parsed = [llama3.encode_rendered(s) for s in strings]
    assert differing(parsed, parsed_ids(reference, strings), strings) == []
    assert reference.encode("Hi") == llama3.encode("Hi", bos=True)
    assert differing(load_tokenizer(tmp_path).encode_batch(strings), ours, strings) == []
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).fingerprint == llama3.fingerprint


@pytest.mark.parametrize("character", ["a", " ", "\n", "\t", "7", "é", "!", "😀"])
def test_a_megabyte_of_one_character_in_llama3_is_metas_within_seconds(llama3, metas, character):
    text = character * 1_000_000
    began = time.perf_counter()
    ids = llama3.encode(text)
    assert time.perf_counter() - began < 20
    assert ids == metas.encode(text, bos=False, eos=False)


# SmolLM2: byte-level BPE described by GGUF metadata. The oracle is the definition of BPE, and transformers.


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


def bpe_by_definition(metadata: dict) -> object:
    """Split each digit off, then by GPT-2's pattern; merge the pair of lowest rank, leftmost first, until none is."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): k for k, m in enumerate(metadata["tokenizer.ggml.merges"])}
    gpt2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    @functools.cache
    def word(text: str) -> list[int]:
        # 21 bytes have no token in this vocabulary; `tokenizers` drops them, here and on the model's own pages
        parts = [letter for letter in byte_level_text(text.encode()) if letter in ids]
        while len(parts) > 1:
            rank, at = min((ranks.get((a, b), 10**9), k) for k, (a, b) in enumerate(itertools.pairwise(parts)))
            if rank == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [ids[p] for p in parts]

    def encode(text: str) -> list[int]:
        stretches = [s for s in regex.split(r"(\p{N})", text) if s]
        return [i for s in stretches for w in gpt2.findall(s) for i in word(w)]

    return encode


def test_smollm2_from_gguf_is_bpe_by_its_definition(smollm2, smollm2_gguf, strings):
    by_definition = bpe_by_definition(read_metadata(smollm2_gguf))
    ours = smollm2.encode_batch(strings)
    assert differing(ours, [by_definition(well_formed(s)) for s in strings], strings) == []
    alphabet = set(smollm2.backend.get_vocab())
    kept = [set(byte_level_text(well_formed(s).encode())) <= alphabet for s in strings]
    assert sum(kept) > 0.9 * len(strings)
    assert all(smollm2.decode(ids) == well_formed(s) for ids, s, k in zip(ours, strings, kept, strict=True) if k)


def test_smollm2_directory_that_we_write_gives_equal_ids_in_transformers(smollm2, strings, tmp_path):
    smollm2.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert differing(smollm2.encode_batch(strings), plain_ids(reference, strings), strings) == []
    parsed = [smollm2.encode_rendered(s) for s in strings]
    assert differing(parsed, parsed_ids(reference, strings), strings) == []
    rng = random.Random(5)
    for _ in range(503):
        ids = [rng.randrange(smollm2.vocab_size) for _ in range(7)]
        assert smollm2.decode(ids, skip_special=False) == reference.decode(ids)
        assert smollm2.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert load_tokenizer(tmp_path).fingerprint == smollm2.fingerprint
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    assert roles.items() <= reference.special_tokens_map.items()
    assert reference.chat_template == smollm2.chat_template.source


@pytest.mark.slow
def test_transformers_reads_the_same_ids_out_of_the_gguf(smollm2, smollm2_gguf, strings):
    reference = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # transformers has no rule for tokenizer.ggml.pre = "smollm" and so does not split digits off first.
    without_digits = [s for s in strings if not regex.search(r"\p{N}", s)]
    assert len(without_digits) > 2_000
    assert differing(smollm2.encode_batch(without_digits), plain_ids(reference, without_digits), without_digits) == []


@pytest.mark.parametrize("character", ["a", " ", "\n", "7", "é"])
def test_a_megabyte_of_one_character_in_byte_level_bpe_takes_seconds(smollm2, character):
    began = time.perf_counter()
    ids = smollm2.encode(character * 1_000_000)
    assert time.perf_counter() - began < 20
    assert smollm2.decode(ids) == character * 1_000_000


# SentencePiece: a small model trained with Llama's settings, since Meta's is not free to ship.


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), 3001)


@pytest.fixture(scope="session")
def llama2_like(sentencepiece_file: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_file)


def test_sentencepiece_ids_are_the_librarys(llama2_like, sentencepiece_file, strings):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ours = llama2_like.encode_batch(strings)
    assert differing(ours, reference.encode([well_formed(s) for s in strings]), strings) == []
    assert [llama2_like.decode(ids) for ids in ours] == [reference.decode(ids) for ids in ours]
    assert (llama2_like.bos_id, llama2_like.eos_id, llama2_like.pad_id) == (1, 2, None)
    assert llama2_like.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_sentencepiece_directory_that_we_write_gives_equal_ids_in_transformers(llama2_like, strings, tmp_path):
    llama2_like.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == llama2_like.model
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    rendered = [ours.encode_rendered(s) for s in strings]
    assert differing(rendered, [llama2_like.encode_rendered(s) for s in strings], strings) == []
    assert differing(rendered, parsed_ids(reference, strings), strings) == []
    assert differing(ours.encode_batch(strings), llama2_like.encode_batch(strings), strings) == []
    some = rendered[:1009]
    assert [ours.decode(ids) for ids in some] == reference.batch_decode(some, skip_special_tokens=True)
    assert reference.encode("Hi") == llama2_like.encode("Hi", bos=True)


def test_each_stretch_after_a_special_token_is_a_sentencepiece_text_of_its_own(llama2_like, sentencepiece_file):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    first, answer = reference.encode("[INST] Hi [/INST] Hello "), reference.encode("[INST] Bye [/INST]")
    text = "<s>[INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST]"
    assert llama2_like.encode_rendered(text) == [1, *first, 2, 1, *answer]


@pytest.mark.parametrize("character", ["a", " ", "\n", "7", "é"])
def test_a_megabyte_of_one_character_in_sentencepiece_takes_seconds(llama2_like, sentencepiece_file, character):
    text = character * 1_000_000
    began = time.perf_counter()
    ids = llama2_like.encode(text)
    assert time.perf_counter() - began < 20
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file)).encode(text)


# GGUF metadata: there and back.


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "llama2_like"])
def test_the_gguf_metadata_that_we_write_holds_the_same_tokenizer(kind, request, strings):
    tokenizer = request.getfixturevalue(kind)
    fields = tokenizer_to_gguf(tokenizer)
    assert all(type(x) in (str, int, float) for v in fields.values() for x in (v if type(v) is list else [int(v == v)]))
    again = tokenizer_from_gguf(fields)
    some = strings[:2003]
    assert differing(again.encode_batch(some), tokenizer.encode_batch(some), some) == []
    assert again.special_ids == tokenizer.special_ids
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert again.stop_ids == tokenizer.stop_ids and again.special.adds_bos == tokenizer.special.adds_bos
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.vocab_size


def test_smollm2_metadata_goes_out_as_it_came_in(smollm2, smollm2_gguf):
    came = {k: v for k, v in read_metadata(smollm2_gguf).items() if k.startswith("tokenizer.")}
    assert tokenizer_to_gguf(smollm2) == {**came, "tokenizer.ggml.add_eos_token": False}
