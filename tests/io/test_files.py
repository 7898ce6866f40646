"""Directories for results and their locks, JSON that every reader takes, and lines."""

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.errors import ConfigError
from arriero.io.files import LOCK, json_bytes, json_text, locked, make_output, split_lines, write_json, write_jsonl

BUSY = ConfigError("busy")


def test_a_directory_is_held_by_one_and_left_as_it_was_found(tmp_path):
    made, found = tmp_path / "a" / "made", tmp_path / "found"
    found.mkdir()
    for directory in (made, found):
        with locked(directory, BUSY), pytest.raises(ConfigError, match="busy"), locked(directory, BUSY):
            pytest.fail("held twice")
    assert not made.exists() and found.is_dir() and not list(found.iterdir())


def test_a_lock_that_was_taken_away_is_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock_and_lose(file, how):
        (tmp_path / LOCK).unlink()  # the one before has finished between our opening and our locking

    monkeypatch.setattr(fcntl, "flock", flock_and_lose)
    with pytest.raises(ConfigError, match="busy"), locked(tmp_path, BUSY):
        pytest.fail("nothing is held")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: nothing can be written there \(it is a file\); give another --out"):
        make_output(tmp_path / "file")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"nothing can be written there \(no permission\)"):
        make_output(tmp_path)


def strict(text):
    """JSON as others read it, for whom NaN is an error."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


any_text = st.text(st.characters(codec=None) | st.sampled_from("\u2028\u2029\x85\x0b\x0c\r\n\ud83d\ude00"))
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner),
    max_leaves=7,
)


@given(any_json)
def test_whatever_json_holds_is_read_back_and_stands_in_one_line_for_every_reader(value):
    data = json_bytes(value)
    assert strict(data.decode()) == strict(json_text(value)) == value
    assert len(data.decode().splitlines()) == 1 and json_text(value).isascii()


def test_numbers_that_are_not_finite_are_null_wherever_they_stand(tmp_path):
    value = {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": {math.nan: 2}}
    expected = {"a": None, "b": [1.5, [None, {"c": None}]], "d": {"nan": 2}}
    write_json(tmp_path / "one.json", value)
    write_jsonl(tmp_path / "two.jsonl", [value, value])
    assert strict((tmp_path / "one.json").read_text()) == strict(json_text(value)) == expected
    assert [strict(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()] == [expected, expected]


@given(any_text)
def test_lines_end_where_universal_newlines_do(text):
    assert split_lines(text) == [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
