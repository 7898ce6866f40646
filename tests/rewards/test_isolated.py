"""Judges in processes of their own: the user's function, patterns, schemas; whatever hangs or dies is told."""

from __future__ import annotations

import os
import resource
import time
from contextlib import ExitStack

import pytest

from arriero.errors import ConfigError, UserError
from arriero.rewards.base import Answer
from arriero.rewards.open import open_scorer


def one(scorer, text, finished=True, **row):
    (score,) = scorer([Answer("What?", text, finished, row)])
    return score


@pytest.fixture(scope="module")
def function(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(
        "import os, time\nfrom arriero.rewards.base import Score\n"
        "def reward(answer):\n"
        "    print('looking at', answer.text)\n"
        "    if answer.text == 'hang': time.sleep(60)\n"
        "    if answer.text == 'die': os._exit(1)\n"
        "    if answer.text == 'nan': return float('nan')\n"
        "    if answer.text == 'score': return Score(0.25, note='a note')\n"
        "    return len(answer.text) / answer.row['of']\n"
    )
    with open_scorer(f"python:{file}:reward", seconds=1) as scorer:
        yield scorer


def test_the_users_function_scores_each_answer_with_its_row(function):
    assert one(function, "abc", of=4).value == 0.75
    assert one(function, "ab", finished=False, of=4).value == 0.5
    assert one(function, "score").note == "a note"


@pytest.mark.parametrize(
    ("text", "outcome"), [("hang", "timeout"), ("die", "crash"), ("nan", "crash"), ("other", "crash")]
)
def test_what_hangs_or_dies_is_worth_nothing_and_says_so(function, text, outcome):
    began = time.monotonic()
    score = one(function, text)
    assert (score.value, score.outcome) == (0, outcome)
    assert time.monotonic() - began < 10
    assert one(function, "abcd", of=4).value == 1


def test_order_is_kept_whatever_hangs(function):
    texts = ["a", "hang", "abc", "die", "ab"]
    scores = function([Answer("", text, row={"of": 1}) for text in texts])
    assert [score.value for score in scores] == [1, 0, 3, 0, 2]


def test_a_pattern_has_to_match_all_of_the_answer():
    with open_scorer("regex", seconds=1) as scorer:
        assert one(scorer, " 12:30\n", pattern=r"\d\d:\d\d").value == 1
        assert one(scorer, "at 12:30", pattern=r"\d\d:\d\d").value == 0
        assert one(scorer, "a" * 40, pattern="(a+)+b").outcome == "timeout"
        with pytest.raises(UserError, match=r"row 2: 'pattern' is '\(', no regular expression"):
            scorer.check({"pattern": "("}, "row 2")


def test_a_row_whose_check_crashes_is_refused_as_one_that_fails_it():
    with open_scorer("reasoning-gym", seconds=1) as scorer:
        with pytest.raises(UserError, match=r"row 3: .*cannot check this row \(crash: AttributeError"):
            scorer.check({"entry": {"metadata": ["chain_sum"]}}, "row 3")
        with pytest.raises(UserError, match="row 4: 'entry' is none of reasoning-gym's"):
            scorer.check({"entry": {"metadata": {}}}, "row 4")


def test_json_has_to_satisfy_the_schema():
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}
    with open_scorer("json-schema", seconds=1) as scorer:
        for text, value in [
            ('{"n": 3}', 1), ('```json\n{"n": 3}\n```', 1), ('{"n": -1}', 0), ('{"n": "3"}', 0), ("{}", 0), ("", 0),
            ('{"n": NaN}', 0), ('{"n": 1, "n": 2}', 0), ('Here: {"n": 3}', 0), ("[" * 100_000, 0),
        ]:  # fmt: skip
            assert one(scorer, text, schema=schema).value == value, text
        assert one(scorer, '{"n": 3}', schema='{"required": ["m"]}').value == 0
        assert one(scorer, '"a"', schema={"$ref": "http://127.0.0.1:9/x.json"}).outcome == "crash"
        with pytest.raises(UserError, match="row 2: 'schema' is no JSON schema"):
            scorer.check({"schema": {"type": "nothing"}}, "row 2")


def test_one_schema_may_stand_for_all_rows(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "array"}')
    with open_scorer(f"json-schema:{tmp_path / 's.json'}", seconds=1) as scorer:
        assert one(scorer, "[1]").value == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python:nowhere.py:f", "nowhere.py: no such file; write python:PATH:FUNCTION"),
        ("python:mine.py", "write python:PATH:FUNCTION"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_once(spec, message):
    with pytest.raises(ConfigError, match=message):
        open_scorer(spec)


def test_a_wrong_name_is_told_with_the_near_one(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(answer): return 1")
    with pytest.raises(ConfigError, match="has no function 'rewards'; did you mean 'reward'"):
        open_scorer(f"python:{tmp_path / 'mine.py'}:rewards")


def test_formulas_are_equal_in_mathematics():
    pytest.importorskip("math_verify")
    with open_scorer("math", seconds=20) as scorer:
        assert one(scorer, "\\boxed{\\frac{\\sqrt{8}}{2}}", answer="\\sqrt{2}").value == 1
        assert one(scorer, "\\boxed{2\\sqrt{2}}", answer="\\sqrt{2}").value == 0


def test_it_scores_beside_more_open_files_than_select_can_watch(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(answer): return len(answer.text)")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this system allows no more than 1,024 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(open(os.devnull))
            with open_scorer(f"python:{tmp_path / 'mine.py'}:reward") as scorer:
                assert one(scorer, "abc").value == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
