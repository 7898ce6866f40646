"""Scored answers of the real model: the rows are preferences, and the scores those of the reward."""

import json

import pytest

from arriero import cli
from arriero.data.preference_formats import parse_preference
from arriero.io.records import read_records


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"prompt": f"Calculate {a} + {b}. Answer with the number only.", "answer": str(a + b)}
        for a, b in ((1, 1), (2, 3), (4, 4))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def short(answer):\n    return 1.0 / (1 + len(answer.text))\n")
    return path


def build(prompts, tmp_path, *more):
    out = tmp_path / "scored.jsonl"
    given = ["data", "build", "scored", "smollm2-135m", str(prompts), str(out), "--max-new-tokens", "12", *more]
    if code := cli.main(given):
        return code, out
    return [json.loads(line) for line in out.read_text().splitlines()], out


def test_the_rows_hold_each_different_finished_answer_with_its_score_and_are_preferences(prompts, tmp_path):
    rows, out = build(prompts, tmp_path, "--reward", f"python:{tmp_path}/mine.py:short", "--answers", "4")
    assert rows
    for row in rows:
        assert row["scores"] == pytest.approx([1 / (1 + len(text)) for text in row["completions"]])
        assert len(set(row["completions"])) == len(row["completions"]) <= 4
    read = [parse_preference(record) for record in read_records(out)]
    assert [p.kind for p in read] == ["scored"] * len(rows)
    assert [list(p.values) for p in read] == [row["scores"] for row in rows]
    assert build(prompts, tmp_path, "--reward", f"python:{tmp_path}/mine.py:short", "--answers", "4")[0] == rows


def test_prompts_whose_answers_have_one_score_are_left_out_and_all_of_them_refused(prompts, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def short(answer):\n    return 1.0\n")
    code, out = build(prompts, tmp_path, "--reward", f"python:{tmp_path}/mine.py:short", "--answers", "2")
    assert code == 2 and not out.exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "no prompt has a better and a worse answer (" in said
    assert "whose answers all have one score" in said
