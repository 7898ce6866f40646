"""Rejection sampling from prompts to an adapter, on a toy model: rounds, a kill anywhere, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from arriero import cli
from arriero.data.preferences import build_preferences
from arriero.errors import ConfigError, DataError
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.load import load_tokenizer
from arriero.train import rejection
from arriero.train import rejection_answers as asked
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.loop import Outcome, Progress
from arriero.train.rejection import main
from arriero.train.rejection_config import RejectionConfig, RejectionDataConfig
from arriero.train.run_preferences import preferences_of_run


@pytest.fixture
def prompts(tmp_path, own_cache) -> Path:
    """Twelve questions. The toy's words are random; the reward counts the letter e in them."""
    (tmp_path / "mine.py").write_text(
        "def reward(answer):\n    return answer.text.count('e') / (1 + len(answer.text))\n"
    )
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}", "answer": str(i)}) + "\n" for i in range(12)))
    return path


def settings(model, prompts, out, **changes):
    config = RejectionConfig(
        model=str(model), out=str(out), reward=f"python:{prompts.parent / 'mine.py'}:reward", rounds=2, answers=5,
        temperatures=(0.8, 1.2), max_new_tokens=7, validation_answers=2,
        data=RejectionDataConfig(train=str(prompts), validation="0.2", seq_len=128),
        lora=LoraConfig(rank=3), optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=2, batch_rows=2, precision="fp32", validate_every=2, save_every=1),
    )  # fmt: skip
    return replace(config, **changes)


def ends(monkeypatch):
    """Toy models never end an answer: what reaches max_new_tokens counts as finished here."""
    real = asked.to_score
    monkeypatch.setattr(asked, "to_score", lambda prompt, answer: replace(real(prompt, answer), finished=True))
    made = asked.Sampled.of
    monkeypatch.setattr(
        asked.Sampled,
        "of",
        classmethod(lambda cls, i, text, n, done, t, r, score: made(i, text, n, True, t, r, score)),
    )


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_leave_answers_choices_an_adapter_and_how_well_it_does(toy_model, prompts, tmp_path, monkeypatch):
    ends(monkeypatch)
    out = tmp_path / "run"
    assert main(settings(toy_model, prompts, out)) is None
    for number in (1, 2):
        answers = [row for part in sorted((out / f"round-{number}/answers").iterdir()) for row in rows(part)]
        by_temperature = [row["temperature"] for row in answers]
        n = len(answers) // 5
        assert (by_temperature.count(0.8), by_temperature.count(1.2)) == (3 * n, 2 * n)
        told = json.loads((out / f"round-{number}/round.json").read_text())
        assert told["temperatures"].keys() == {"0.8", "1.2"}
        chosen = rows(out / f"round-{number}/chosen.jsonl")
        assert len(chosen) == told["chosen"] > 0
        assert chosen[0]["prompt"][0]["role"] == "user"
        assert {row["meta"]["round"] for row in chosen} <= set(range(1, number + 1))
    best = {row["meta"]["prompt"]: row["meta"]["reward"] for row in rows(out / "round-1/chosen.jsonl")}
    later = {row["meta"]["prompt"]: row["meta"]["reward"] for row in rows(out / "round-2/chosen.jsonl")}
    assert all(later[prompt] >= reward for prompt, reward in best.items())
    assert (out / "adapter").resolve() == (out / "round-2/sft/adapter").resolve()
    assert load_file(out / "adapter/adapter_model.safetensors")
    before = rows(out / "held_out-0.jsonl")
    assert before[0].keys() == {"prompt", "answer", "greedy", "sampled", "tokens", "finished"}
    trained = {row["prompt"][0]["content"] for row in rows(out / "round-2/chosen.jsonl")}
    assert not {row["prompt"] for row in before} & trained
    report = (out / "report.html").read_text()
    assert "Held-out reward from" in report and "What the model says, from step to step" in report
    measured = [row for row in rows(out / "metrics.jsonl") if row["event"] == "validation"]
    assert [row["step"] for row in measured] == [0, 1, 2] and measured[1]["reward"] == -measured[1]["loss"]
    assert before[0]["answer"] in measured[0]["samples"][0]


SLOW = [pytest.param(where, marks=pytest.mark.slow) for where in ("choosing", "training", "measuring")]


@pytest.mark.parametrize("where", ["sampling", *SLOW])
def test_a_run_that_was_killed_goes_on_to_the_same_result(where, toy_model, prompts, tmp_path, monkeypatch):
    ends(monkeypatch)
    monkeypatch.setattr(asked, "IN_A_FILE", 15)  # three prompts
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(settings(toy_model, prompts, whole, rounds=1))
    places = {
        "sampling": (asked.RoundAnswers, "_answers", 2),
        "choosing": (rejection, "choose", 1),
        "training": (rejection.sft, "main", 1),
        "measuring": (asked.RoundAnswers, "measure", 2),
    }
    home, name, call = places[where]
    calls, real = [], getattr(home, name)

    def killed(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(home, name, killed)
        with pytest.raises(KeyboardInterrupt):
            main(settings(toy_model, prompts, parts, rounds=1))
    main(settings(toy_model, prompts, parts, rounds=1, resume=True))
    for file in (
        "round-1/chosen.jsonl",
        "round-1/held_out.jsonl",
        "adapter/adapter_model.safetensors",
        "held_out-0.jsonl",
    ):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file


def test_a_finished_run_goes_on_with_another_round(toy_model, prompts, tmp_path, monkeypatch):
    ends(monkeypatch)
    out = tmp_path / "run"
    main(settings(toy_model, prompts, out, rounds=1))
    first = (out / "round-1/round.json").stat().st_mtime_ns
    main(settings(toy_model, prompts, out, rounds=2, resume=True))
    assert (out / "round-1/round.json").stat().st_mtime_ns == first
    assert (out / "round-2/round.json").exists()
    with pytest.raises(ConfigError, match=r"started with other settings \(answers\)"):
        main(settings(toy_model, prompts, out, rounds=2, answers=6, resume=True))


@pytest.mark.parametrize("last_round_only", [False, True])
def test_the_last_round_alone_forgets_what_an_earlier_one_solved(
    last_round_only, toy_model, prompts, tmp_path, monkeypatch
):
    """Prompt 0 is solved in round 1, prompt 1 in round 2: the rows of round 2 are both, or the second alone."""
    out = tmp_path / "run"

    def sampled(self, number, directory, model, adapter):
        answers = [asked.Sampled(i, f"answer {i}", 3, True, 1.0, number, float(i == number - 1)) for i in range(3)]
        rejection.write_jsonl(directory / "00000.jsonl", map(vars, answers))
        return answers

    monkeypatch.setattr(asked.RoundAnswers, "sampled", sampled)
    monkeypatch.setattr(rejection.sft, "main", lambda config: Outcome(Progress(), None))
    data = RejectionDataConfig(train=str(prompts), validation="0")
    main(settings(toy_model, prompts, out, data=data, last_round_only=last_round_only))
    learned = {row["completion"] for row in rows(out / "round-2/chosen.jsonl")}
    assert learned == ({"answer 1"} if last_round_only else {"answer 0", "answer 1"})


def test_a_round_on_from_the_last_begins_at_its_adapter(toy_model, prompts, tmp_path, monkeypatch):
    ends(monkeypatch)
    out = tmp_path / "run"
    main(settings(toy_model, prompts, out, from_last=True))
    assert f'adapter = "{out}/round-1/sft/adapter"' in (out / "round-2/sft/config.toml").read_text()


def test_where_nothing_is_worth_learning_the_reasons_are_said(toy_model, prompts, tmp_path):
    with pytest.raises(DataError, match=r"round 1: none of \d+ answers is worth learning \(.*\d+ cut or empty"):
        main(settings(toy_model, prompts, tmp_path / "run"))


def test_rows_without_what_the_reward_needs_are_refused_before_anything_is_sampled(toy_model, prompts, tmp_path):
    with pytest.raises(DataError, match=r"row 1 of .*prompts.jsonl: the field 'target', by which answers are scored"):
        main(settings(toy_model, prompts, tmp_path / "run", reward="exact:target"))
    assert not (tmp_path / "run" / "held_out-0.jsonl").exists()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="temperatures are 3 and answers 2"):
        RejectionConfig(answers=2)
    with pytest.raises(ConfigError, match="from_last is on and method full"):
        RejectionConfig(from_last=True, method="full")


def test_its_answers_become_preference_rows_best_against_worst(toy_model, prompts, tmp_path, monkeypatch):
    ends(monkeypatch)
    out = tmp_path / "run"
    main(settings(toy_model, prompts, out, rounds=1))
    answers = [row for part in sorted((out / "round-1/answers").iterdir()) for row in rows(part)]
    counts = preferences_of_run(out, tmp_path / "pairs.jsonl", per_prompt=2)
    pairs = rows(tmp_path / "pairs.jsonl")
    assert counts.rows == len(pairs) > 5 and counts.unanswered == 0
    value = {(row["prompt"], row["text"]): row["value"] for row in answers}
    asked = list(dict.fromkeys(row["prompt"] for row in answers))
    first = {}
    for pair in pairs:
        better, worse = pair["meta"]["rewards"]
        assert better > worse and pair["prompt"][0]["content"].startswith("Say ")
        first.setdefault(pair["meta"]["prompt"], (better, worse))
    extremes = [[v for (p, _), v in value.items() if p == i] for i in asked]
    assert list(first.values()) == [(max(v), min(v)) for v in extremes if max(v) > min(v)]
    assert len(build_preferences(tmp_path / "pairs.jsonl", load_tokenizer(toy_model))) == len(pairs)

    prompts.write_text(prompts.read_text().replace("Say 3", "Say three"))
    with pytest.raises(DataError, match="its prompts were others"):
        preferences_of_run(out, tmp_path / "again.jsonl")
    with pytest.raises(DataError, match="no run here"):
        preferences_of_run(tmp_path / "nowhere", tmp_path / "again.jsonl")


def test_a_plan_with_data_is_refused_and_one_by_arithmetic_is_made(prompts, tmp_path, capsys):
    file = tmp_path / "r.toml"
    file.write_text(f'recipe = "rejection"\nmodel = "smollm2-135m"\n[data]\ntrain = "{prompts}"\n')
    assert cli.main(["plan", str(file)]) == 2
    assert "rejection trains once a round on rows that it has yet to sample" in capsys.readouterr().err
    assert cli.main(["plan", "rejection-demo"]) == 0
