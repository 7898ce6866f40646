import sys

import pytest

from arriero.errors import UserError
from arriero.eval.metrics import is_one_sentence, normalised, text_scorer


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # LCS of "return the sum of all values" (6) and "return sum of the values" (5): return sum of values = 4
    scores = text_scorer()("Return the sum of all values.", "return sum of the values")
    precision, recall = 4 / 5, 4 / 6
    assert scores.rouge_l == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores.exact == 0


def test_chrf_is_that_of_a_plain_computation_with_beta_two():
    reference, answer = "closes files", "close file"
    f_scores = []
    for n in range(1, 7):
        wanted, given = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in ("closesfiles", "closefile"))
        common = sum(min(wanted.count(gram), given.count(gram)) for gram in set(given))
        f_scores.append((common / len(given), common / len(wanted)))
    precision, recall = (sum(column) / 6 for column in zip(*f_scores, strict=True))
    expected = 5 * precision * recall / (4 * precision + recall)
    assert text_scorer()(reference, answer).chrf == pytest.approx(expected)


def test_equal_texts_score_one_and_unrelated_ones_zero():
    assert vars(text_scorer()("Open the gate.", "Open the gate.")) == {"rouge_l": 1, "chrf": 1, "exact": 1}
    assert vars(text_scorer()("abc", "xyz")) == {"rouge_l": 0, "chrf": 0, "exact": 0}
    assert vars(text_scorer()("abc", "")) == {"rouge_l": 0, "chrf": 0, "exact": 0}


def test_exact_match_forgives_case_punctuation_and_white_space_only():
    assert normalised(" Return  the\tValue. ") == normalised("return the value")
    assert normalised("Return a value") != normalised("Return value")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the list of names.", True),
        ("Return the list of names", True),
        ("Take a path, e.g. Path('x'), or a file.", True),
        ("Parse v1.2 of J. Smith's format.", True),
        ("Return it. Then close the file.", False),
        ("Is it a file? Returns True.", False),
        ('Quote it ("a.") Then stop.', False),
        ("Return it.\nArgs: x", False),
        ("  ", False),
    ],
)
def test_one_sentence_is_one_line_with_no_sentence_end_inside(text, expected):
    assert is_one_sentence(text) is expected


def test_a_missing_metric_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"rouge_score.*pip install 'arriero\[eval\]'"):
        text_scorer()
