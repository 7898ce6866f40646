"""MinHash: signatures against true Jaccard similarity, clusters against brute force."""

from __future__ import annotations

import itertools
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from arriero.curate import minhash
from arriero.curate.analysis import analyse
from arriero.curate.minhash import MinHashConfig, band_keys, clusters, keep, signatures
from arriero.errors import ConfigError

CONFIG = MinHashConfig()
TOPICS = list(pydoc_data.topics.topics.values())


def words(random: np.random.Generator, count: int) -> list[str]:
    return ["".join(random.choice(list("bcdfghjklm"), 7)) for _ in range(count)]


def edit(random: np.random.Generator, text: list[str], changes: int) -> list[str]:
    """A copy with some words replaced."""
    edited = list(text)
    for place in random.choice(len(text), changes, replace=False):
        edited[place] = words(random, 1)[0]
    return edited


def jaccard(a: list[str], b: list[str], n: int = 5) -> float:
    one, other = ({tuple(x[i : i + n]) for i in range(len(x) - n + 1)} for x in (a, b))
    return len(one & other) / len(one | other)


def sign(*texts: str, config: MinHashConfig = CONFIG) -> NDArray[np.uint32]:
    return signatures(analyse(list(texts)), config)


def test_cpp_and_numpy_sign_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TOPICS, "", "four words are few", "but five words are one", "ÉTÉ 1984 世界 " * 7]
    for config in (CONFIG, MinHashConfig(ngram=1, bands=3, rows=7, seed=5)):
        fast = sign(*texts, config=config)
        with monkeypatch.context() as patch:
            patch.setattr(minhash, "load_library", lambda: None)
            np.testing.assert_array_equal(sign(*texts, config=config), fast)


def test_equal_numbers_estimate_the_jaccard_similarity() -> None:
    """Each number agrees with probability J: over 61 pairs the mean error is within 4 standard errors of 0."""
    random, errors, variances = np.random.default_rng(3), [], []
    for _ in range(61):
        text = words(random, 211)
        other = edit(random, text, int(random.integers(0, 61)))
        a, b = sign(" ".join(text), " ".join(other))
        truth = jaccard(text, other)
        errors.append((a == b).mean() - truth)
        variances.append(truth * (1 - truth) / CONFIG.hashes)
        assert abs(errors[-1]) < 5 * np.sqrt(variances[-1]) + 1e-9
    assert abs(np.mean(errors)) < 4 * np.sqrt(np.sum(variances)) / len(errors)


def test_form_does_not_matter_and_order_does() -> None:
    a, b, c = sign("The  CAFÉ, in 1984; was full!", "the cafe in\n2001 was “full”", "the cafe was full in 1984")
    np.testing.assert_array_equal(a, b)
    assert (a == c).mean() < 0.1


def test_a_signature_depends_on_its_document_and_the_seed_alone() -> None:
    alone = sign(TOPICS[3])[0]
    np.testing.assert_array_equal(sign("x y z", TOPICS[3], "", TOPICS[5])[1], alone)
    assert (sign(TOPICS[3], config=MinHashConfig(seed=2))[0] == alone).mean() < 0.1


def test_chinese_is_compared_by_characters() -> None:
    text = "这个港口很安静早上没有人船都停在城墙旁边我们等了很久直到渡轮终于来了"
    a, b = sign(text, text.replace("渡轮", "轮船"))
    assert 0.5 < (a == b).mean() < 0.95


def test_band_keys_are_equal_where_all_rows_are() -> None:
    config = MinHashConfig(bands=3, rows=2)
    signed = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 4, 3, 5, 7], [2, 1, 3, 4, 5, 6], [2**32 - 1] * 6], np.uint32)
    keys = band_keys(signed, config)
    equal = keys[:, None, :] == keys[None, :, :]
    assert equal[0, 1].tolist() == [True, False, False]
    assert equal[0, 2].tolist() == [False, True, True]
    assert equal[1, 2].tolist() == [False, False, False]
    assert (keys[3] == minhash.NO_KEY).all() and (keys[:3] != minhash.NO_KEY).all()


def brute_force(keys: NDArray[np.uint64], signed: NDArray[np.uint32] | None, threshold: float) -> list[int]:
    """The first of each connected component of pairs that share a key and agree enough."""
    first = list(range(len(keys)))
    for a, b in itertools.combinations(range(len(keys)), 2):
        share = ((keys[a] == keys[b]) & (keys[a] != minhash.NO_KEY)).any()
        if share and (signed is None or (signed[a] == signed[b]).mean() >= threshold):
            low, high = sorted((first[a], first[b]))
            first = [low if x == high else x for x in first]
    return first


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), max_size=23))
def test_clusters_are_connected_by_shared_keys(rows: list[list[int]]) -> None:
    keys = np.array(rows, np.uint64).reshape(-1, 3)
    assert clusters(keys).tolist() == brute_force(keys, None, 0)
    assert keep(keys).tolist() == [i == first for i, first in enumerate(brute_force(keys, None, 0))]


@pytest.fixture(scope="module")
def corpus() -> tuple[list[list[str]], NDArray[np.uint32]]:
    """109 documents: 37 originals, each followed later by near and less near copies of some."""
    random = np.random.default_rng(5)
    originals = [words(random, 151) for _ in range(37)]
    copies = [edit(random, originals[i % 37], int(random.integers(0, 23))) for i in range(72)]
    texts = originals + copies
    return texts, sign(*(" ".join(text) for text in texts))


def test_clusters_of_texts_equal_brute_force(corpus: tuple[list[list[str]], NDArray[np.uint32]]) -> None:
    _, signed = corpus
    keys = band_keys(signed, CONFIG)
    found = clusters(keys, signed, CONFIG)
    assert found.tolist() == brute_force(keys, signed, CONFIG.min_similarity)
    assert 37 < len(set(found.tolist())) < 100  # some copies are too far from their original


def test_near_duplicates_are_found_and_unlike_ones_kept(corpus: tuple[list[list[str]], NDArray[np.uint32]]) -> None:
    texts, signed = corpus
    kept = keep(band_keys(signed, CONFIG), signed, CONFIG)
    assert kept[:37].all()
    for copy in range(37, len(texts)):
        similarity = jaccard(texts[copy], texts[copy % 37])
        if similarity > 0.9:
            assert not kept[copy]
        if similarity < 0.4:
            assert kept[copy]


def test_chance_collisions_do_not_chain_unlike_documents() -> None:
    """a and c share one band with b, as happens to long documents with a common passage, but agree in little else."""
    random = np.random.default_rng(7)
    signed = random.integers(0, 2**31, (3, CONFIG.hashes)).astype(np.uint32)
    signed[1, :8], signed[2, 8:16] = signed[0, :8], signed[1, 8:16]
    keys = band_keys(signed, CONFIG)
    assert clusters(keys).tolist() == [0, 0, 0]
    assert clusters(keys, signed, CONFIG).tolist() == [0, 1, 2]


def test_a_bucket_may_hold_several_clusters() -> None:
    """Documents that share a band with an unlike first one are still compared with each other."""
    random = np.random.default_rng(11)
    signed = np.repeat(random.integers(0, 2**31, (3, CONFIG.hashes)).astype(np.uint32), 3, axis=0)
    signed[:, :8] = signed[0, :8]  # all agree in the first band
    signed[:, 8::8] = np.arange(9)[:, None]  # and none in another one whole
    signed = signed[[0, 3, 6, 1, 4, 7, 2, 5, 8]]
    assert clusters(band_keys(signed, CONFIG), signed, CONFIG).tolist() == [0, 1, 2] * 3


def test_documents_without_shingles_are_no_duplicates_of_each_other() -> None:
    signed = sign("too few words", "", "too few words", "...")
    assert keep(band_keys(signed, CONFIG), signed, CONFIG).all()


def test_memory_maps_and_parts_of_the_key_space_give_the_same(
    corpus: tuple[list[list[str]], NDArray[np.uint32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, signed = corpus
    keys = band_keys(signed, CONFIG)
    expected = clusters(keys, signed, CONFIG)
    np.save(tmp_path / "keys.npy", keys.T)
    np.save(tmp_path / "signatures.npy", signed)
    monkeypatch.setattr(minhash, "SORT_AT_ONCE", 7)
    monkeypatch.setattr(minhash, "_COMPARE_AT_ONCE", 3)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("keys", "signatures")]
    np.testing.assert_array_equal(clusters(mapped[0].T, mapped[1], CONFIG), expected)


def test_signatures_of_shards_are_those_of_the_whole(corpus: tuple[list[list[str]], NDArray[np.uint32]]) -> None:
    texts, signed = corpus
    shards = [sign(*(" ".join(text) for text in texts[i : i + 23])) for i in range(0, len(texts), 23)]
    np.testing.assert_array_equal(np.concatenate(shards), signed)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^near_dedup.rows is 0; it must be at least 1$"):
        MinHashConfig(rows=0)
    with pytest.raises(ConfigError, match=r"^near_dedup.min_similarity is 70; it must be from 0 to 1$"):
        MinHashConfig(min_similarity=70)


def test_no_documents() -> None:
    signed = sign()
    assert signed.shape == (0, 112)
    assert keep(band_keys(signed, CONFIG), signed, CONFIG).tolist() == []
