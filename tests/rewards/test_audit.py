"""The audit: built-in rewards judge at least 95% of planted answers as they ought to, and bad ones are found out."""

from __future__ import annotations

import pytest

from arriero import cli
from arriero.errors import DataError
from arriero.rewards.audit import BUILT_IN, audit, caught
from arriero.rewards.open import open_scorer


@pytest.mark.parametrize("kind", BUILT_IN)
def test_built_in_rewards_catch_at_least_95_percent(kind):
    if kind == "math":
        pytest.importorskip("math_verify")
    with open_scorer(kind, seconds=20 if kind in ("math", "regex", "json-schema") else 2) as scorer:
        findings = audit(scorer, BUILT_IN[kind])
    wrong = [(f.planted.kind, f.planted.text, f.note) for f in findings if f.paid != f.planted.right]
    assert caught(findings) >= 0.95, wrong
    assert {f.planted.kind for f in findings} == {
        "right", "wrong", "empty", "hedged", "format only", "prompt injected",
    }  # fmt: skip


def test_a_reward_that_looks_for_the_answer_anywhere_is_found_out(tmp_path, capsys):
    (tmp_path / "lax.py").write_text("def reward(answer):\n    return float(answer.row['answer'] in answer.text)\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2?", "answer": "4"}\n{"prompt": "5+2?", "answer": "7"}\n')
    assert (
        cli.main(["reward", "audit", f"python:{tmp_path / 'lax.py'}:reward", "--data", str(tmp_path / "rows.jsonl")])
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "hedged" in printed
    lax = open_scorer(f"python:{tmp_path / 'lax.py'}:reward")
    with lax:
        findings = audit(lax, [{"answer": "4"}, {"answer": "7"}])
    paid = {f.planted.kind for f in findings if f.paid and not f.planted.right}
    assert paid >= {"hedged", "wrong"}
    assert caught(findings) < 0.8


def test_rows_that_plant_nothing_wrong_are_refused():
    with pytest.raises(DataError, match="all rows have one right answer, so there is no wrong one to plant"):
        audit(open_scorer("exact"), [{"answer": "4"}])


def test_a_reward_without_built_in_rows_asks_for_some(capsys):
    assert cli.main(["reward", "audit", "judge:http://127.0.0.1:9/v1"]) == 2
    assert "give some of yours by --data" in capsys.readouterr().err


def test_every_kind_of_reward_is_described():
    from arriero.rewards.open import DESCRIPTIONS, KINDS

    assert {name.partition(":")[0].partition("[")[0] for name in DESCRIPTIONS} == KINDS.keys() - {"llama2-plain"}
