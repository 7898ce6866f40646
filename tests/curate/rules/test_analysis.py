"""Words, lines and paragraphs of a batch: C++ against Python, and both against what paper can check."""

from __future__ import annotations

import inspect
import pydoc_data.topics
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arriero.curate import analysis, analysis_twin
from arriero.curate.analysis import Analysis, analyse
from arriero.curate.spans import (
    AFTER_SPACE,
    BLANK,
    ENDS_ELLIPSIS,
    ENDS_SENTENCE,
    ENDS_TERMINAL,
    HAS_LETTER,
    IS_SYMBOL,
    STARTS_BULLET,
    Spans,
    hash_text,
)


def words(text: str) -> list[str]:
    found = analyse([text])
    return [found.text(found.words, i) for i in range(len(found.words.start))]


def assert_twins_agree(texts: list[str]) -> None:
    library = analysis.load_library()
    assert library is not None, "analysis.cpp did not compile here"
    documents = np.cumsum([0, *map(len, texts)])
    fast, slow = analysis._scan(library, texts, documents), analysis_twin.scan(texts, documents)
    for name in fast._fields:
        one, other = getattr(fast, name), getattr(slow, name)
        pairs = (
            [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Spans)]
            if isinstance(one, Spans)
            else [(one, other)]
        )
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=name)


# pieces that the rules of the tokeniser speak of, so that random texts meet them
PIECES = st.sampled_from(
    ["Mr.", "don't", "N’T", "it's", "we'll", "l'll", "...", "…", "10km", "5%", "+5", "3+4", "a-b", "--", "U.S.",
     "http://a.b", "www.", "x.org/y", "$5", "5$", "€", "•", "-", "(", ")", '"', "'", "\n", "\n\n", " ", "\t", "\r\n",
     "世界", "。", "ไทย", "é", "e\u0301", "😀", "٣", "İ", "ﬁ", "\ud800", "\x00", "\u2028", "a:b", "<b>", "a.B",
     "=", "_", "#", ","]
)  # fmt: skip
TEXTS = st.lists(st.one_of(PIECES, st.characters(), st.text("abcXYZ059.'-", max_size=5)), max_size=40).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, max_size=5))
@example([])
@example(["", "\n", " \n ", "\n\n\n"])
@example(["\U0010ffff" * 3 + "a"])
@example(["don't\x00 I'd\x00"])
def test_cpp_and_python_cut_any_texts_alike(texts: list[str]) -> None:
    assert_twins_agree(texts)


def test_cpp_and_python_cut_real_prose_and_code_alike() -> None:
    assert_twins_agree([*list(pydoc_data.topics.topics.values())[::7], inspect.getsource(inspect)[:50_000]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith doesn't pay $5.50 (or 5€)!", "Mr. | Smith | does | n't | pay | $ | 5.50 | ( | or | 5 | € | ) | !"),
        ("We'll see: it’s John's.", "We | 'll | see | : | it | ’s | John | 's | ."),
        ("lov'd by e.g. the U.S. at 10km", "lov'd | by | e.g. | the | U.S. | at | 10 | km"),
        ("well-known a/b x=y 2+2 end.Start", "well | - | known | a | / | b | x | = | y | 2 | + | 2 | end | . | Start"),
        ("see https://example.org/a-b?c=d, ok...", "see | https://example.org/a-b?c=d | , | ok | ..."),
        ("NASA. a. b.", "NASA | . | a. | b."),
        ("世界，你好 ไทย", "世 | 界 | ， | 你 | 好 | ไ | ท | ย"),
        ("Ελλάδα· «Привет», мир!", "Ελλάδα | · | « | Привет | » | , | мир | !"),
        ("ok😀ok", "ok | 😀 | ok"),
        (" \u00a0\u2003", ""),
    ],
)
def test_words_are_cut_as_spacy_does(text: str, expected: str) -> None:
    assert " | ".join(words(text)) == expected


def test_kinds_of_words_in_any_script() -> None:
    found = analyse(["é9 ... ٣٤ ? «» 世 。 -"])
    kinds = {found.text(found.words, i): int(found.words.kind[i]) & ~AFTER_SPACE for i in range(len(found.words.start))}
    assert kinds["é9"] == kinds["世"] == HAS_LETTER
    assert kinds["..."] == kinds["»"] == kinds["-"] == IS_SYMBOL
    assert kinds["٣٤"] == 0
    assert kinds["?"] == kinds["。"] == IS_SYMBOL | ENDS_SENTENCE


def test_lines_and_paragraphs() -> None:
    found = analyse(["\n- one.\n  • two...\n\n \n\n\nthree…  \nfour\n", "x"])
    lines = [found.text(found.lines, i) for i in range(int(found.lines.first[1]))]
    assert lines == ["", "- one.", "  • two...", "", " ", "", "", "three…  ", "four", ""]
    assert found.lines.kind.tolist() == [
        BLANK, STARTS_BULLET | ENDS_TERMINAL, STARTS_BULLET | ENDS_TERMINAL | ENDS_ELLIPSIS, BLANK, BLANK, BLANK, BLANK,
        ENDS_ELLIPSIS, 0, BLANK, 0,
    ]  # fmt: skip
    paragraphs = [found.text(found.paragraphs, i) for i in range(len(found.paragraphs.start))]
    assert paragraphs == ["- one.\n  • two...", " ", "three…  \nfour", "x"]
    assert found.paragraphs.first.tolist() == [0, 3, 4]


def folded(text: str) -> list[int]:
    return analyse([text]).content[0].tolist()


def test_folding_forgets_case_accents_punctuation_and_digits() -> None:
    assert folded("Ça, VOILÀ: 12,345 Straße!") == folded("ca voila 9 straße")
    assert folded("Ça") == [hash_text("ca")] and folded("1984") == [hash_text("0")]
    assert folded("e\u0301te\u0301") == folded("été") == folded("ETE")
    assert folded("Привет") == folded("привет") != folded("приве")
    assert folded("... — !") == []


def test_counts_per_document() -> None:
    found: Analysis = analyse(["a b\na b", "", "c5 d!"])
    assert found.characters.tolist() == [7, 0, 5]
    assert found.words.count.tolist() == [4, 0, 3]
    assert found.alphanumeric.tolist() == [4, 0, 3]
    assert found.words.repeated.tolist() == [False, False, True, True, False, False, False]
    assert found.words.document.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert found.lines.per_document(found.lines.length).tolist() == [6, 0, 5]
    assert found.line_words.tolist() == [0, 2, 4, 4, 7]


def test_hashes_are_the_same_for_ever() -> None:
    """Stored signatures would be lost: 1 by hand from h = (M ^ 97) * M, mixed."""
    multiplier, final, mask = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 2**64 - 1
    value = (multiplier ^ ord("a")) * multiplier & mask
    value = (value ^ value >> 32) * final & mask
    assert hash_text("a") == value ^ value >> 29 == int(analyse(["a"]).words.hash[0])
