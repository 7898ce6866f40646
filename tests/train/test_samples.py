"""Answers before and after training, in a file whose lines are not those of `str.splitlines`."""

import json

import pytest

from arriero.data.formats import Conversation
from arriero.train.samples import Sample, _asked, write_samples

ODD = ["a\u2028b", "c\u2029d", "e\x85f", "g\x0bh", "i\x0cj\x1ck", "l\r\nm", "n\ud83do"]


def written(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("text", ODD)
def test_what_some_readers_take_for_a_line_end_loses_no_sample(tmp_path, text):
    write_samples(tmp_path, [Sample(text, text, "one"), Sample("?", "!", text)], "before")
    assert len((tmp_path / "samples.jsonl").read_text("utf-8").splitlines()) == 2
    write_samples(tmp_path, [Sample(text, text, "two"), Sample("?", "!", text)], "after")
    assert written(tmp_path) == [
        {"prompt": text, "reference": text, "before": "one", "after": "two"},
        {"prompt": "?", "reference": "!", "before": text, "after": text},
    ]


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_a_resume_may_ask_for_more_or_fewer_samples(tmp_path, n):
    samples = [Sample(f"{i}?", f"{i}!", "x") for i in range(5)]
    write_samples(tmp_path, samples[:3], "before")
    write_samples(tmp_path, samples[:n], "after")
    rows = written(tmp_path)
    assert [row["prompt"] for row in rows] == [f"{i}?" for i in range(n)]
    assert ["before" in row for row in rows] == [i < 3 for i in range(n)] and all("after" in row for row in rows)


def test_answers_after_stand_alone_where_the_file_is_gone_or_cut(tmp_path):
    write_samples(tmp_path, [Sample("?", "!", "x")], "after")
    assert written(tmp_path) == [{"prompt": "?", "reference": "!", "after": "x"}]
    (tmp_path / "samples.jsonl").write_bytes(b'{"prompt": "\xff')
    write_samples(tmp_path, [Sample("?", "!", "x")], "after")
    assert written(tmp_path) == [{"prompt": "?", "reference": "!", "after": "x"}]


def test_the_prompt_shown_is_a_text_or_nothing():
    answer = {"role": "assistant", "content": "Yo"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]}
    assert _asked(Conversation([parts, answer], None, "f", 1)) == "Hi there"
    assert _asked(Conversation([answer], None, "f", 1)) == ""
    assert _asked(Conversation([{"role": "assistant", "tool_calls": [{}]}, answer], None, "f", 1)) == ""
