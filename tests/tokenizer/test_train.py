"""Vocabularies learned from text: files that every loader reads alike, and samples that depend on text alone."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import regex
import sentencepiece
import tiktoken
import tiktoken.load
from helpers.tokenizers import hard_strings, python_source, well_formed
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from arriero.errors import ConfigError, DataError, UserError
from arriero.io.gguf_header import read_metadata
from arriero.tokenizer import load_tokenizer
from arriero.tokenizer.chat import encode_chat
from arriero.tokenizer.gguf import tokenizer_from_gguf, tokenizer_to_gguf
from arriero.tokenizer.llama3 import SPLIT, load_tiktoken_model
from arriero.tokenizer.sample import CHUNK, chunks, draw_sample
from arriero.tokenizer.train import TrainingConfig, check_empty, learn_llama2, learn_llama3, train

N_STRINGS = 3001


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [python_source(name) for name in ("argparse", "inspect", "typing", "pydoc_data/topics", "datetime")]


@pytest.fixture(scope="module")
def llama3(corpus, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("llama3")
    return out, train(iter(corpus), TrainingConfig("llama3", vocab_size=2003, n_special=17), out)


@pytest.fixture(scope="module")
def llama2(corpus, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("llama2")
    return out, train(iter(corpus), TrainingConfig("llama2", vocab_size=1511), out)


def test_llama3s_kind_loads_everywhere_with_equal_ids(llama3, tmp_path):
    out, strings = llama3[0], hard_strings(N_STRINGS)
    ours = load_tokenizer(out)
    ids = ours.encode_batch(strings)
    texts = [well_formed(s) for s in strings]
    native = load_tokenizer(out / "tokenizer.model")
    assert native.encode_batch(strings) == ids
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    assert theirs.encode("Hi") == ours.encode("Hi", bos=True)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [ours.encode_rendered(t) for t in texts]
    ranks = tiktoken.load.load_tiktoken_bpe(str(out / "tokenizer.model"))
    encoding = tiktoken.Encoding("x", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode_ordinary_batch(texts, num_threads=1) == ids
    assert all(ours.decode(row) == text for row, text in zip(ids, texts, strict=True))
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    metas = MetaTokenizer(out / "tokenizer.model")
    assert [metas.encode(t, bos=False, eos=False) for t in texts] == ids
    for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag"):
        assert ours.special_ids[f"<|{name}|>"] == metas.special_tokens[f"<|{name}|>"], name


def test_llama2s_kind_loads_everywhere_with_equal_ids(llama2):
    out, strings = llama2[0], hard_strings(N_STRINGS)
    ours = load_tokenizer(out)
    ids = ours.encode_batch(strings)
    texts = [well_formed(s) for s in strings]
    assert sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model")).encode(texts) == ids
    assert load_tokenizer(out / "tokenizer.model").encode_batch(strings) == ids
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [ours.encode_rendered(t) for t in texts]
    assert theirs.encode("Hi") == ours.encode("Hi", bos=True)
    assert ours.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2} and ours.vocab_size == 1511
    assert ours.token_bytes(3) == b"\0" and ours.token_bytes(258) == b"\xff"


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_a_trained_tokenizer_goes_through_gguf(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind)[0])
    fields = tokenizer_to_gguf(tokenizer)
    assert fields["tokenizer.ggml.pre"] == {"llama3": "llama-bpe", "llama2": "default"}[kind]
    strings = hard_strings(503)
    assert tokenizer_from_gguf(fields).encode_batch(strings) == tokenizer.encode_batch(strings)


def test_a_model_with_a_trained_tokenizer_is_read_out_of_gguf_by_transformers(llama3, tmp_path):
    from dataclasses import replace

    import torch

    from arriero.checkpoint.convert import convert
    from arriero.checkpoint.hf import save_hf
    from arriero.model.catalogue import PUBLISHED
    from arriero.model.llama import Llama

    ours = load_tokenizer(llama3[0])
    shape = replace(
        PUBLISHED["llama3-8b"], dim=96, n_heads=12, n_kv_heads=3, head_dim=8, n_layers=1, ffn_dim=107, vocab_size=2003
    )
    save_hf(Llama(shape).init_weights(seed=5), tmp_path / "hf", ours, dtype=torch.float32)
    convert(tmp_path / "hf", tmp_path / "m.gguf", to="gguf")
    strings = [well_formed(s) for s in hard_strings(503)]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ids = theirs(strings, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == ours.encode_batch(strings)
    assert read_metadata(tmp_path / "m.gguf")["tokenizer.ggml.bos_token_id"] == ours.bos_id == 2003 - 17


def test_the_special_block_follows_the_ranks_and_chats(llama3):
    tokenizer = load_tokenizer(llama3[0])
    assert tokenizer.vocab_size == 2003 and len(tokenizer.special_ids) == 17
    assert sorted(tokenizer.special_ids.values()) == list(range(1986, 2003))
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([b]) for b in range(256)]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1986, 1987, 1990)
    assert tokenizer.special_ids["<|eot_id|>"] == 1995
    ids = encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])
    assert ids[0] == tokenizer.bos_id and tokenizer.special_ids["<|start_header_id|>"] in ids


def test_metas_params_tell_how_long_a_special_block_is(llama3, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama3[0] / "tokenizer.model").read_bytes())
    assert load_tiktoken_model(tmp_path / "tokenizer.model").vocab_size == 1986 + 256
    (tmp_path / "params.json").write_text('{"vocab_size": 2003, "use_scaled_rope": true}')
    assert load_tiktoken_model(tmp_path / "tokenizer.model").vocab_size == 2003


def test_byte_level_merges_are_those_of_the_definition():
    text = python_source("argparse")[:30_011]
    words = Counter(word for word in regex.findall(SPLIT, text))
    rows = [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]
    learned = learn_llama3([text.encode()], 256 + 101 + 11, n_special=11).ranks
    merges = sorted((rank, token) for token, rank in learned.items() if rank >= 256)
    for _, token in merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for row, n in rows:
            for pair in itertools.pairwise(row):
                pairs[pair] += n
        best = max(pairs.values())
        pair = next(p for p, n in pairs.items() if n == best and p[0] + p[1] == token)  # fails if it was no best pair
        for row, _ in rows:
            i = 0
            while i < len(row) - 1:
                if (row[i], row[i + 1]) == pair:
                    row[i : i + 2] = [token]
                i += 1


def test_byte_level_quality_is_that_of_the_tokenizers_library(corpus):
    learned = learn_llama3([t.encode() for t in corpus], 1500, n_special=11)
    other = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1489, initial_alphabet=alphabet, show_progress=False)
    )
    held_out = python_source("asyncio/tasks")
    ours, theirs = len(learned.encode(held_out)), len(other.encode(held_out).ids)
    assert abs(ours - theirs) < 0.005 * theirs  # ties are broken differently, no more


def test_training_is_the_same_whatever_the_order_of_the_documents(corpus, tmp_path):
    for kind in ("llama3", "llama2"):
        config = TrainingConfig(kind, vocab_size=701, n_special=11, sample=400_000)
        prints = set()
        for seed in range(2):
            shuffled = random.Random(seed).sample(corpus, len(corpus))
            prints.add(train(iter(shuffled), config, tmp_path / f"{kind}{seed}")["fingerprint"])
        assert len(prints) == 1, kind


def test_a_sample_is_the_smallest_hashes_that_fit_whatever_the_order():
    texts = [f"document {i} " + "x" * (i * 37 % 1009) for i in range(997)]
    whole = draw_sample(texts, 10**9)
    assert sorted(whole.training + whole.held_out) == sorted(t.encode() for t in texts)
    assert whole.n_documents == 997 and whole.n_bytes == sum(map(len, texts))
    in_order = whole.held_out + whole.training
    for seed in range(3):
        drawn = draw_sample(random.Random(seed).sample(texts, len(texts)), 50_021)
        kept = drawn.held_out + drawn.training
        assert kept == in_order[: len(kept)] and sum(map(len, kept)) <= 50_021
        assert sum(map(len, kept)) + len(in_order[len(kept)]) > 50_021
        assert 0.01 <= sum(map(len, drawn.held_out)) / sum(map(len, kept)) < 0.04
    assert whole.n_bytes > 9 * 50_021


def test_a_long_document_is_cut_after_line_ends_and_loses_nothing():
    text = ("word " * 11 + "\n") * 5003 + "x" * (2 * CHUNK + 17) + "\nend"
    parts = list(chunks(text))
    assert "".join(parts) == text and max(map(len, parts)) <= CHUNK
    assert sum(part.endswith("\n") for part in parts) >= len(parts) - 3
    assert list(chunks("")) == [] and list(chunks("ab")) == ["ab"]


def test_long_lines_are_not_dropped_by_sentencepiece():
    line = " ".join(f"llama{i % 13} hums" for i in range(3001))  # 40 KB, where the library's own limit is 4,192 bytes
    assert len(learn_llama2([line.encode()], 290).encode("llama7 hums")) < 10


def test_the_report_says_what_was_learned_and_from_what(llama3, corpus):
    out, report = llama3
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    text, held_out, vocabulary = report["text"], report["held_out"], report["vocabulary"]
    assert text["documents"] == len(corpus) and text["bytes"] == sum(len(t.encode()) for t in corpus)
    assert text["learned_from_bytes"] + text["held_out_bytes"] == text["bytes"]
    assert held_out["bytes"] == text["held_out_bytes"] and held_out["bytes_per_token"] > 2.5
    assert held_out["bytes_per_token"] == pytest.approx(held_out["bytes"] / held_out["tokens"], abs=1e-4)
    assert held_out["unknown"] == 0 and vocabulary["tokens"] == 2003 - 17
    assert sum(vocabulary["tokens_by_bytes"].values()) == vocabulary["tokens"]
    assert vocabulary["tokens_by_bytes"][1] == 256 and 0.1 < vocabulary["used_share"] < 1
    assert vocabulary["parts_of_characters"] >= 128  # bytes from 0x80 on are no characters by themselves


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "llama4"}, "kind is 'llama4'; known are llama3 and llama2"),
        ({"n_special": 7}, "n_special is 7; Llama 3's named tokens need 11, its block has 256"),
        ({"vocab_size": 512}, "vocab_size is 512; the bytes and special tokens alone take 512: give at least 513, or"),
        ({"vocab_size": 259, "kind": "llama2"}, "alone take 259: give at least 260$"),
        ({"sample": 0}, "sample is 0; give a positive number of bytes"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        TrainingConfig(**settings)


def test_too_little_text_is_refused_with_what_it_would_give(tmp_path):
    with pytest.raises(DataError, match=r"holds only 2\d\d different tokens, 4,000 are asked for \(and 11 special"):
        learn_llama3([b"to be or not to be"], 4011, n_special=11)
    text = b"to be or not to be"
    with pytest.raises(DataError, match=r"cannot learn 4,011 pieces .*: it gives 281; give more text, or .* most 281$"):
        learn_llama2([text], 4011)
    with pytest.raises(DataError, match=r"its characters, the bytes and special tokens take 266; give a vocab_size of"):
        learn_llama2([text], 265)
    assert [learn_llama2([text], n).vocab_size for n in (266, 281)] == [266, 281]  # as advised
    with pytest.raises(DataError, match="there is no text to learn from; check the sources and the text column"):
        draw_sample(["", ""], 101)
    with pytest.raises(DataError, match="no chunk of text fits in a sample of 3 bytes; give a larger sample"):
        draw_sample(["long enough"], 3)
    (tmp_path / "there").write_text("x")
    with pytest.raises(UserError, match="there: is a file, and a directory is to be written; choose another name"):
        check_empty(tmp_path / "there", force=True)
    with pytest.raises(UserError, match="/dev/zero: is a file, and a directory is to be written; choose another name"):
        check_empty(Path("/dev/zero"), force=True)
    with pytest.raises(UserError, match="exists already; choose another name, or give --force"):
        check_empty(tmp_path, force=False)
    check_empty(tmp_path, force=True)
