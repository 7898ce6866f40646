"""pass@k and rewards of the real model on checked prompts, against its answers asked one by one."""

import json
import re
from itertools import combinations

import pytest
import torch
from rich.console import Console

from arriero.checkpoint.load import load
from arriero.data.prompts import read_prompts
from arriero.errors import ConfigError, DataError
from arriero.eval.config import PassConfig
from arriero.eval.pass_at_k import pass_at_k
from arriero.eval.verified import _seed, run_verified
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.model.linear import densify

QUIET = Console(quiet=True)


@pytest.fixture
def questions(tmp_path):
    rows = [(1, 1), (2, 3), (7, 5)]
    text = "".join(
        json.dumps({"prompt": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)}) + "\n"
        for a, b in rows
    )
    (tmp_path / "test.jsonl").write_text(text)
    return tmp_path / "test.jsonl"


def test_rewards_and_pass_at_k_are_those_of_the_answers_one_by_one(questions, tmp_path):
    config = PassConfig(
        model="smollm2-135m", data=str(questions), answers=3, max_new_tokens=9, out=str(tmp_path / "out"),
        compare_with="smollm2-135m",
    )  # fmt: skip
    found = run_verified(config, QUIET)
    model, tokenizer = load("smollm2-135m", dtype=torch.bfloat16)
    model = densify(model)  # as every evaluation measures it
    engine = Engine(model, tokenizer)

    def alone(prompt, sampling):
        [[answer]] = engine.generate([Request(prompt.ids, 9, sampling)])
        return answer

    for prompt, sample in zip(read_prompts(questions, tokenizer, max_length=99), found.samples, strict=True):
        seed = _seed(0, prompt)
        drawn = [alone(prompt, SamplingConfig(temperature=1.0, seed=seed + i)) for i in range(3)]
        wanted = prompt.fields["answer"]
        right = [a.stopped and re.findall(r"\d+", a.text)[-1:] == [wanted] for a in drawn]
        assert sample.scores["pass@1"] == pytest.approx(sum(right) / 3)
        assert sample.scores["pass@3"] == float(any(right))
        assert sample.scores["stopped"] == pytest.approx(sum(a.stopped for a in drawn) / 3)
        assert sample.answer == alone(prompt, SamplingConfig(temperature=0.0)).text
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["measures"]
    assert {"greedy_reward", "reward", "pass@1", "pass@3", "stopped"} == saved.keys()
    assert all(line["difference"]["value"] == 0 for line in saved.values())  # the same model, on the same draws


def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one():
    for n, c in ((5, 0), (5, 2), (7, 3), (4, 4)):
        answers = [i < c for i in range(n)]
        for k in range(1, n + 1):
            every = [any(choice) for choice in combinations(answers, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(every) / len(every))


def test_rows_that_cannot_be_scored_are_refused_before_the_model_is_loaded(questions, tmp_path, monkeypatch):
    monkeypatch.setattr("arriero.eval.run.load", None)
    config = {"model": "smollm2-135m", "data": str(questions)}
    with pytest.raises(DataError, match=r"row 1 of .*test.jsonl: the field 'wanted'"):
        run_verified(PassConfig(**config, reward="numeric:wanted"), QUIET)
    with pytest.raises(ConfigError, match="'numerical' is no reward"):
        run_verified(PassConfig(**config, reward="numerical"), QUIET)
    with pytest.raises(ConfigError, match="no data given"):
        run_verified(PassConfig(model="smollm2-135m"), QUIET)
