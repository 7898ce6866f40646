import io
import json
import math

import pytest
from rich.console import Console

from arriero.errors import CheckpointError
from arriero.eval.bootstrap import mean
from arriero.eval.results import (
    Results,
    Sample,
    compare,
    comparison_table,
    examples_table,
    refuse_not_finite,
    results_table,
    save,
)


def results(model: str, rouge: list[float], bits: list[float]) -> Results:
    samples = [
        Sample(f"def f{i}(): [bold]", f"Want {i}.", f"{model} {i}.", {"rouge_l": r}) for i, r in enumerate(rouge)
    ]
    return Results(model, {"rouge_l": mean(rouge), "bits_per_token": mean(bits)}, samples, len(rouge), 1.5)


BEFORE = results("base", [0.1 + 0.01 * (i % 7) for i in range(37)], [3.0 + 0.1 * (i % 5) for i in range(37)])
AFTER = results("tuned", [0.4 + 0.01 * (i % 7) for i in range(37)], [2.0 + 0.1 * (i % 5) for i in range(37)])


def shown(*tables: object) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables)
    return console.export_text()


def test_better_means_higher_for_scores_and_lower_for_costs():
    compared = compare(BEFORE, AFTER, resamples=200, seed=0)
    assert {key: line.verdict for key, line in compared.items()} == {"rouge_l": "better", "bits_per_token": "better"}
    back = compare(AFTER, BEFORE, resamples=200, seed=0)
    assert {key: line.verdict for key, line in back.items()} == {"rouge_l": "worse", "bits_per_token": "worse"}
    assert compared["bits_per_token"].difference.value == pytest.approx(-1.0)


def test_an_interval_that_holds_zero_is_unclear():
    noise = results("same", [0.1 + 0.01 * ((3 * i) % 7) for i in range(37)], [3.0] * 37)
    assert compare(BEFORE, noise, resamples=200, seed=0)["rouge_l"].verdict == "unclear"
    assert compare(BEFORE, BEFORE, resamples=200, seed=0)["bits_per_token"].verdict == "unclear"


def test_a_difference_of_rounding_is_a_tie():
    rounded = results(
        "same", [0.1 + 0.01 * (i % 7) for i in range(37)], [3.0 + 0.1 * (i % 5) - 1e-6 for i in range(37)]
    )
    assert {line.verdict for line in compare(BEFORE, rounded, 200, 0).values()} == {"unclear"}
    better = results(
        "better", [0.1 + 0.01 * (i % 7) for i in range(37)], [3.0 + 0.1 * (i % 5) - 1e-3 for i in range(37)]
    )
    assert compare(BEFORE, better, 200, 0)["bits_per_token"].verdict == "better"


def test_tables_show_numbers_and_leave_brackets_in_answers_alone():
    text = shown(comparison_table(BEFORE, AFTER, compare(BEFORE, AFTER, 200, 0)))
    assert "-1.000 (-1.000 to -1.000)" in text
    assert [line.rstrip() for line in text.splitlines()][:3] == ["37 rows", "before: base", "after:  tuned"]
    text = shown(examples_table(BEFORE, AFTER, 3))
    assert [f"f{i}()" in text for i in (0, 12, 24, 1)] == [True, True, True, False]
    assert "[bold]" in text
    assert "tuned 24." in text
    assert "base: 37 rows in 2 s" in shown(results_table(BEFORE, 200, 0))


def test_files_hold_the_settings_the_intervals_and_a_line_a_row(tmp_path):
    settings = {"resamples": 200, "seed": 0, "model": "tuned"}
    save(tmp_path / "new", settings, BEFORE, AFTER)
    found = json.loads((tmp_path / "new/results.json").read_text())
    assert found["settings"] == settings
    assert found["measures"]["bits_per_token"]["difference"]["value"] == pytest.approx(-1.0)
    assert found["measures"]["rouge_l"]["before"]["low"] <= BEFORE.ratios["rouge_l"].value
    lines = [json.loads(line) for line in (tmp_path / "new/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 37
    assert lines[5]["before"] == "base 5."
    assert lines[5]["after"] == "tuned 5."
    assert lines[5]["reference"] == "Want 5."

    save(tmp_path / "new", settings, None, AFTER)
    assert set(json.loads((tmp_path / "new/results.json").read_text())["measures"]["rouge_l"]) == {
        "value",
        "low",
        "high",
    }
    assert json.loads((tmp_path / "new/samples.jsonl").read_text().splitlines()[0])["answer"] == "tuned 0."
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["results.json", "samples.jsonl"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_whose_outputs_are_no_numbers_is_never_better(tmp_path, bad):
    broken = results("broken", [0.9] * 37, [3.0] * 36 + [bad])  # it stops at once, say, and so scores well elsewhere
    for before, after in ((BEFORE, broken), (broken, BEFORE)):
        assert {line.verdict for line in compare(before, after, 200, 0).values()} == {"unclear"}
        text = " ".join(shown(comparison_table(before, after, compare(before, after, 200, 0))).split())
        assert "not finite (none) unclear" in text and "nan" not in text
        save(tmp_path, {"resamples": 200, "seed": 0}, before, after)
        found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["measures"]
        assert found["bits_per_token"]["difference"] == {"value": None, "low": None, "high": None}
        with pytest.raises(CheckpointError, match=r"broken: bits per token not finite \(in 1 of 37 rows or windows\)"):
            refuse_not_finite(before, after)
    assert "not finite" in shown(results_table(broken, 200, 0))
    refuse_not_finite(None, BEFORE)


def test_a_choice_stands_beside_what_chance_gives(tmp_path):
    chosen = Results("m", {"chosen": mean([1.0, 0.0, 0.0])}, [], 3, 0.0)
    assert "prefers it to 9 others (chance 10%)" in shown(results_table(chosen, 200, 0))
    both = shown(comparison_table(chosen, chosen, compare(chosen, chosen, 200, 0)))  # wrapped at 80 columns
    assert all(word in both for word in ("others", "(chance", "10%)", "unclear")), both
    for before in (None, chosen):
        save(tmp_path, {"resamples": 200, "seed": 0}, before, chosen)
        assert json.loads((tmp_path / "results.json").read_text())["measures"]["chosen"]["chance"] == 0.1
