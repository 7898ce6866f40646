"""Repetition counts: C++ against Python, and Python against paper."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from arriero.curate import ngrams
from arriero.curate.ngrams import duplicate_ngrams, ngram_coverage, top_ngram
from arriero.curate.spans import hash_text

Count = Callable[..., NDArray[np.int64]]


@pytest.fixture(params=["C++", "Python"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python":
        monkeypatch.setattr(ngrams, "load_library", lambda: None)


def count(what: Count, text: str, *sizes: int) -> list[int]:
    words = text.split()
    hashes = np.array([hash_text(word) for word in words], np.uint64)
    lengths = np.array([len(word) for word in words], np.int64)
    return what(hashes, lengths, np.array([0, len(words)]), sizes)[0].tolist()


@pytest.mark.usefixtures("either")
def test_top_ngram_is_the_most_frequent_times_its_count_with_spaces() -> None:
    assert count(top_ngram, "a bcd a bcd a bcd x", 2, 3, 4) == [
        3 * len("a bcd"),
        2 * len("a bcd a"),
        2 * len("a bcd a bcd"),
    ]


@pytest.mark.usefixtures("either")
def test_of_equally_frequent_ngrams_the_earliest_counts() -> None:
    assert count(top_ngram, "aa b ccc d aa b ccc d", 2) == [2 * len("aa b")]
    assert count(top_ngram, "long word but once", 2, 3, 4) == [9, 13, 18]  # even where none repeats, as datatrove
    assert count(top_ngram, "two words", 2, 3) == [9, 0]
    assert count(top_ngram, "", 2) == [0]


@pytest.mark.usefixtures("either")
def test_duplicate_ngrams_count_no_character_twice() -> None:
    text = "p q r s t " * 3  # the second and the third five words repeat the first, with no overlap
    assert count(duplicate_ngrams, text, 2, 5, 7) == [4 + 4 + 2, 10, 7]
    assert count(duplicate_ngrams, "p q r s t p q r s", 5) == [0]


@pytest.mark.usefixtures("either")
def test_coverage_counts_each_word_of_a_repeated_ngram_once() -> None:
    assert count(ngram_coverage, "aa bb cc x aa bb cc y", 2, 3, 4) == [12, 12, 0]
    assert count(ngram_coverage, "z z z z z", 2) == [5]


GROUPS = st.lists(st.text("abcd", max_size=60), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(GROUPS, st.sets(st.integers(2, 11), min_size=1))
def test_cpp_and_python_count_alike(groups: list[str], sizes: set[int]) -> None:
    letters = "".join(groups)
    hashes = np.array([hash_text(c) for c in letters], np.uint64)
    lengths = np.array([ord(c) - 95 for c in letters], np.int64)
    first = np.cumsum([0, *map(len, groups)])
    for what in (top_ngram, duplicate_ngrams, ngram_coverage):
        fast = what(hashes, lengths, first, tuple(sorted(sizes)))
        with patch.object(ngrams, "load_library", lambda: None):
            slow = what(hashes, lengths, first, tuple(sorted(sizes)))
        np.testing.assert_array_equal(fast, slow, err_msg=what.__name__)
