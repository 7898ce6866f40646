"""Documents to flat arrays: the fast engine against its slow twin, on every family."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.tokenizers import hard_strings, small_sentencepiece, train_sentencepiece

from arriero.errors import UserError
from arriero.tokenizer import Tokenizer, load_tokenizer, parallel
from arriero.tokenizer.llama3 import _cut
from arriero.tokenizer.parallel import DocumentEncoder


@pytest.fixture(scope="module")
def families(smollm2_gguf, tmp_path_factory) -> dict[str, Tokenizer]:
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None and spec.submodule_search_locations
    pieces = load_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("pieces"), 1009))
    folder = tmp_path_factory.mktemp("json")
    pieces.save(folder)
    return {
        "tiktoken": load_tokenizer(Path(next(iter(spec.submodule_search_locations))) / "llama3" / "tokenizer.model"),
        "split by digits": load_tokenizer(smollm2_gguf),
        "sentencepiece": pieces,
        "sentencepiece as tokenizer.json": load_tokenizer(folder),
    }


FAMILIES = [
    "tiktoken",
    "split by digits",
    "sentencepiece",
    "sentencepiece as tokenizer.json",
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parallel", [True, False])
def test_the_fast_engine_gives_the_ids_of_its_slow_twin(families, family, parallel):
    tokenizer, strings = families[family], hard_strings(4001 if parallel else 2003)
    fast = DocumentEncoder(tokenizer, parallel=parallel)
    assert fast.engine == "gigatoken"
    encoded = fast.encode(strings)
    twin = DocumentEncoder(tokenizer, engine="exact").encode(strings)
    assert encoded.ids.dtype == np.uint32 and encoded.offsets.dtype == np.int64 and len(encoded) == len(strings)
    wrong = [s for i, s in enumerate(strings) if not np.array_equal(encoded[i], twin[i])]
    assert wrong == []
    assert np.array_equal(encoded.offsets, twin.offsets) and np.array_equal(encoded.ids, twin.ids)
    assert twin[17].tolist() == tokenizer.encode(strings[17])


def test_bos_and_eos_stand_around_every_document(families):
    tokenizer = families["tiktoken"]
    texts = ["Hello", "", "I'LL"]
    for engine in ("auto", "exact"):
        encoder = DocumentEncoder(tokenizer, engine=engine)
        for bos, eos in ((True, True), (True, False), (False, True)):
            marks = {"before": tokenizer.bos_id if bos else None, "after": tokenizer.eos_id if eos else None}
            rows = [row.tolist() for row in encoder.encode(texts, **marks)]
            assert rows == [tokenizer.encode(t, bos=bos, eos=eos) for t in texts]
        assert len(encoder.encode([])) == len(encoder.encode([], after=3)) == 0


def test_rare_texts_take_the_slow_way_and_only_they(families):
    fast = DocumentEncoder(families["split by digits"])
    texts = [
        "Hello 123",
        "x\x04y",
        "½ of 7",
        "naïve 7",
        "٣ apples",
        "7 日本",
    ]  # a byte without a token; digits beyond 0-9
    rows = fast._fast.encode(texts)
    assert sorted(fast._fast.doubtful(texts, rows)) == [1, 2, 4]
    assert [row.tolist() for row in fast.encode(texts)] == families["split by digits"].encode_batch(texts)


def test_a_pipeline_that_the_fast_engine_does_not_know_is_encoded_by_its_own_library(families, tmp_path):
    families["split by digits"].save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(tmp_path)
    encoder = DocumentEncoder(tokenizer)
    assert encoder.engine == "exact"
    assert encoder.encode(["Hello 123"]).ids.tolist() == tokenizer.encode("Hello 123")


@pytest.mark.parametrize("character", ["a", " ", "\n", "é"])
def test_long_runs_are_cut_where_metas_loader_cuts_them(families, character):
    tokenizer = families["tiktoken"]
    texts = [character * n for n in (25_000, 25_001, 50_003)] + ["x " + character * 25_001 + " y"]
    encoded = DocumentEncoder(tokenizer).encode(texts)
    assert [row.tolist() for row in encoded] == [tokenizer.encode(text) for text in texts]


def test_a_long_text_is_cut_where_metas_loader_cuts_it(families):
    tokenizer, text = families["tiktoken"], "ab " * 150_001
    assert DocumentEncoder(tokenizer).encode([text])[0].tolist() == tokenizer.encode(text)


def test_texts_are_cut_exactly_where_the_slow_rule_cuts_them(families):
    rng = random.Random(11)
    for _ in range(101):
        runs = [rng.choice("a \n!") * rng.choice([1, 7, 12_503, 24_999, 25_000, 25_001, 30_011]) for _ in range(5)]
        text = "".join(runs)
        assert families["tiktoken"].parts_of(text) == _cut(text)


def test_special_tokens_that_merges_spell_do_not_come_out(tmp_path):
    small_sentencepiece().save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    for merge in (["</", "s>"], ["s", ">"], ["<", "/"]):  # as some converters write it
        state["model"]["merges"].insert(0, merge)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(tmp_path)
    fast = DocumentEncoder(tokenizer)
    assert fast.engine == "gigatoken" and fast._fast.spells_special
    assert 2 in fast._fast.encode(["Hi</s>"])[0]
    texts = ["Hello", "Hi</s> Hi<s>", "</s>"]
    for encoder in (fast, DocumentEncoder(tokenizer, engine="exact")):
        assert [row.tolist() for row in encoder.encode(texts)] == [tokenizer.encode(text) for text in texts]
        assert not set(encoder.encode(texts).ids.tolist()) & {0, 1, 2}
    assert not DocumentEncoder(small_sentencepiece())._fast.spells_special


def test_a_copy_for_a_worker_process_gives_equal_ids(families):
    encoder = DocumentEncoder(families["sentencepiece"], parallel=False)
    again = copy.deepcopy(encoder)
    assert again.engine == encoder.engine and not again.parallel
    assert np.array_equal(again.encode(["Hello there"]).ids, encoder.encode(["Hello there"]).ids)


def test_an_engine_that_errs_is_caught(families, monkeypatch):
    tokenizer = families["sentencepiece"]
    monkeypatch.setattr(parallel, "CHECK_EVERY", 7)
    encoder = DocumentEncoder(tokenizer)
    right = encoder._fast.encode
    monkeypatch.setattr(
        encoder._fast, "encode", lambda texts: [row[:-1] if len(row) > 5 else row for row in right(texts)]
    )
    with pytest.raises(UserError, match=r"document 14, which begins 'one two.*gigatoken gave other ids than"):
        encoder.encode(["a"] * 14 + ["one two three four five six"])


def test_tables_are_built_anew_when_memory_grows_and_ids_stay(families, monkeypatch):
    monkeypatch.setattr(parallel, "MAX_GROWTH", -(10**12))
    monkeypatch.setattr(parallel, "MIN_TEXT", 101)
    encoder = DocumentEncoder(families["sentencepiece"])
    first = encoder._fast._backend
    texts = ["The quick brown fox " * 11] * 3
    want = families["sentencepiece"].encode_batch(texts)
    for _ in range(3):
        assert [row.tolist() for row in encoder.encode(texts)] == want
    assert encoder._fast._backend is not first
