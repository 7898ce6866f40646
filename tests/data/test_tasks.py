"""Tasks with exact answers: right, different from each other, and honest about what is held out."""

from __future__ import annotations

import json
import random
import re

import pytest

from arriero import cli
from arriero.data import tasks
from arriero.data.formats import parse_records
from arriero.data.tasks import Hardness, build_tasks
from arriero.errors import ConfigError
from arriero.io.records import read_records


def build(name, out, train=300, held_out=100, seed=0, size=2, digits=2, settings=None):
    hard = Hardness(size, digits)
    return build_tasks(name, out, train=train, held_out=held_out, seed=seed, hard=hard, settings=settings or {})


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_question_is_held_out_and_trained_on_or_stands_twice(name, tmp_path):
    stats = build(name, tmp_path, size=3)
    asked = [row["prompt"] for part in ("train", "test") for row in rows(tmp_path / f"{part}.jsonl")]
    assert len(asked) == len(set(asked)) == 400
    assert stats["overlap"] == 0 == tasks.overlap(tmp_path / "train.jsonl", tmp_path / "test.jsonl")


def test_an_overlap_would_be_counted(tmp_path):
    build("chain-sum", tmp_path)
    first = (tmp_path / "test.jsonl").read_text().splitlines()[0]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(first.replace("Calculate", "calculate  ") + "\n")
    assert tasks.overlap(tmp_path / "train.jsonl", tmp_path / "test.jsonl") == 1


def test_answers_are_right():
    rng, hard = random.Random(3), Hardness(3, 2)
    for _ in range(50):
        text, answer = tasks.chain_sum(rng, hard)
        parts = re.findall(r"([-+]?) ?(\d+)", text)
        assert sum(int(sign + digits) for sign, digits in parts) == int(answer)
        text, answer = tasks.number_sorting(rng, hard)
        wanted = sorted(map(int, re.findall(r"\d+", text)), reverse="descending" in text)
        assert list(map(int, answer.split(", "))) == wanted
        text, answer = tasks.letter_counting(rng, hard)
        letter, words = re.findall(r'"(.*?)"', text)
        assert words.count(letter) == int(answer) > 0
        text, answer = tasks.leg_counting(rng, hard)
        legs = (
            int(n) * tasks.LEGS.get(kind, tasks.LEGS.get(kind[:-1])) for n, kind in re.findall(r"(\d+) (\w+)", text)
        )
        assert sum(legs) == int(answer)


def test_the_seed_decides_the_questions(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build("chain-sum", tmp_path / name, seed=seed)
    a, b, c = (rows(tmp_path / name / "train.jsonl") for name in "abc")
    assert a == b != c


def test_a_small_task_says_how_many_questions_it_has(tmp_path):
    with pytest.raises(
        ConfigError, match=r"chain-sum gives 200 different questions .* and 400 are wanted; make it larger"
    ):
        build("chain-sum", tmp_path, digits=1)


def test_unknown_tasks_are_refused_with_the_near_one(tmp_path):
    with pytest.raises(ConfigError, match=r"'chainsum' is no task.*did you mean 'chain-sum'"):
        build("chainsum", tmp_path)
    with pytest.raises(ConfigError, match="settings max_terms are reasoning-gym's"):
        build("chain-sum", tmp_path, settings={"max_terms": 3})


def test_neighbouring_seeds_of_reasoning_gym_do_not_leak(tmp_path):
    """Its instance i is seeded with seed + i: a test set of the next seed would be the training set again."""
    pytest.importorskip("reasoning_gym")
    line = "data build tasks reasoning-gym:leg_counting OUT --train 60 --held-out 30 --set min_animals=2 max_animals=2"
    assert cli.main([word.replace("OUT", str(tmp_path)) for word in line.split()]) == 0
    train, test = rows(tmp_path / "train.jsonl"), rows(tmp_path / "test.jsonl")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    from arriero.rewards.base import Answer
    from arriero.rewards.open import open_scorer

    with open_scorer("reasoning-gym", seconds=30) as scorer:
        scorer.check(test[0], "row 1")
        given = [Answer("", row["answer"], row=row) for row in test] + [Answer("", "-1", row=test[0])]
        values = [score.value for score in scorer(given)]
    assert values[:-1] == [1] * 30
    assert values[-1] < 1


def test_what_is_written_is_read_by_fine_tuning_as_it_is(tmp_path):
    build("number-sorting", tmp_path)
    read = list(parse_records(read_records(tmp_path / "train.jsonl")))
    for conversation, row in zip(read, rows(tmp_path / "train.jsonl"), strict=True):
        assert [m["content"] for m in conversation.messages] == [row["prompt"], row["answer"]]
