"""Environments: episodes in processes of their own, which hang, crash and are killed."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import ConfigError, DataError
from arriero.rewards.base import Answer, Score
from arriero.rewards.environment import Environments, Turn, open_environment
from arriero.rewards.games import GuessNumber

SOURCE = """
import os, time
from arriero.rewards.environment import Environment, Turn

class Counting(Environment):
    def __init__(self, row, rng):
        self.left, self.drawn, self.begun = row["left"], rng.random(), os.getpid()

    def turn(self, answer):
        if answer == "hang":
            time.sleep(60)
        if answer == "raise":
            raise OSError("no tool")
        if answer == "die":
            os._exit(3)
        if answer == "nan":
            return Turn(reward=float("nan"))
        if answer == "nothing":
            return "a text"
        self.left -= 1
        said = f"{self.left} left of {self.drawn:.6f}, says {answer}"
        if not self.left:
            return Turn(reward=1.0)
        return Turn([{"role": "tool", "content": said}] if answer == "tool" else said, 0.5)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


@pytest.fixture
def counting(source: Path) -> Iterator[Environments]:
    with Environments(f"{source}:Counting", seconds=2.0, workers=2) as environment:
        yield environment


def asked(*texts: str, number: int = 0, seed: int = 7, left: int = 3, finished: bool = True) -> Answer:
    return Answer("go", texts[-1], finished, {"left": left}, "row 1", texts[:-1], seed, number)


def test_an_episode_goes_on_until_nothing_is_replied_and_each_turn_is_worth_something(counting: Environments) -> None:
    drawn = f"{random.Random(7).random():.6f}"
    assert counting([asked("a")]) == [Score(0.5, reply=f"2 left of {drawn}, says a")]
    assert counting([asked("a", "tool")]) == [
        Score(0.5, reply=[{"role": "tool", "content": f"1 left of {drawn}, says tool"}])
    ]
    assert counting([asked("a", "tool", "c")]) == [Score(1.0)]


def test_episodes_do_not_know_of_each_other_and_those_of_a_seed_have_the_same_chance(counting: Environments) -> None:
    first = counting([asked("a", number=k) for k in range(9)] + [asked("b", seed=8)])
    assert len({score.reply for score in first}) == 2
    second = counting([asked("a", f"then {k}", number=k) for k in range(9)])
    assert [str(score.reply).partition("says ")[2] for score in second] == [f"then {k}" for k in range(9)]


def test_an_episode_is_played_again_where_its_process_was_killed(counting: Environments) -> None:
    counting([asked("a", number=k) for k in range(6)])
    died = counting([asked("a", "die", number=0)])
    assert died == [Score(0.0, "crash", "its process died")]
    goes_on = counting([asked("a", "c", number=k) for k in range(6)])
    assert all(str(score.reply).startswith("1 left") for score in goes_on)
    never_seen = counting([asked("x", "y", "z", number=99)])  # as from a journal
    assert never_seen == [Score(1.0)]


def test_a_hang_a_crash_and_what_is_no_turn_end_their_own_episode_alone(counting: Environments) -> None:
    began = time.monotonic()
    scores = counting(
        [asked(text, number=k) for k, text in enumerate(["hang", "raise", "nan", "nothing", "fine", "fine", "fine"])]
        + [asked("12", number=8, finished=False)]
    )
    assert time.monotonic() - began < 30
    assert [score.outcome for score in scores] == ["timeout", *["crash"] * 3, *["scored"] * 3, "cut"]
    assert [score.value for score in scores] == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0]
    assert [score.reply is None for score in scores] == [True] * 4 + [False] * 3 + [True]
    notes = ["over 2 s", "OSError: no tool (mine.py, line 13)", "finite number", "return a Turn(reply, reward)"]
    assert all(note in score.note for note, score in zip(notes, scores, strict=False))


def test_a_row_that_no_episode_begins_with_is_named(counting: Environments) -> None:
    counting.check({"left": 2}, "row 1 of x.jsonl")
    with pytest.raises(DataError, match=r"row 2 of x.jsonl: the environment does not begin \(KeyError: 'left'"):
        counting.check({}, "row 2 of x.jsonl")


def test_what_is_no_environment_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"write FILE.py:CLASS, or one of .*did you mean 'guess-number'"):
        open_environment("gues-number", 1.0)
    with pytest.raises(ConfigError, match=r"environment: .*mine.py has no class 'Countin'.*'Counting'"):
        open_environment(f"{source}:Countin", 1.0)
    with pytest.raises(ConfigError, match=r"no such file; write FILE\.py:CLASS"):
        open_environment("nowhere.py:Counting", 1.0)


def test_the_example_of_the_documentation_is_an_environment(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "rl.md").read_text("utf-8")
    (tmp_path / "mine.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    row = {"answer": "408"}

    def answer(*texts: str) -> Answer:
        return Answer("12 * 34?", texts[-1], True, row, "row 1", texts[:-1])

    with open_environment(f"{tmp_path / 'mine.py'}:Calculator", 10.0) as environment:
        [first] = environment([answer("calc: 12 * 34")])
        assert first == Score(0.0, note="calc: 12 * 34 = 408", reply=[{"role": "tool", "content": "408"}])
        assert environment([answer("calc: 12 * 34", "answer: 408")]) == [Score(1.0)]
        assert environment([answer("408")])[0].value == -0.1


def test_a_question_of_reasoning_gym_may_be_tried_again_and_pays_its_best_try_once(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: arriero[rl]")
    from arriero.data.tasks import Hardness, build_tasks

    stats = build_tasks(
        "reasoning-gym:leg_counting", tmp_path, train=1, held_out=0, seed=0, hard=Hardness(), settings={}
    )
    row = json.loads((tmp_path / "train.jsonl").read_text())
    assert stats["train"] == 1

    def answer(*texts: str) -> Answer:
        return Answer(row["prompt"], texts[-1], True, row, "row 1", texts[:-1])

    with open_environment("reasoning-gym:leg_counting", 60.0) as environment:
        environment.check(row, "row 1")
        [first] = environment([answer("-1")])
        assert first.value < 1 and first.reply == "That is not right. Try again, and give the answer only."
        [second] = environment([answer("-1", row["answer"])])
        assert second.value == pytest.approx(1 - first.value) and second.reply is None
    with open_environment("reasoning-gym:chain_sum", 60.0) as environment:
        told = "the row is of reasoning-gym's leg_counting, and the environment is reasoning-gym:chain_sum"
        with pytest.raises(DataError, match=told):
            environment.check(row, "row 1")


# -- guess the number --------------------------------------------------------------------------------------------------


def game(secret: int, tries: int = 3) -> GuessNumber:
    found = GuessNumber({"low": 1, "high": 7, "tries": tries}, random.Random(0))
    found._secret = secret
    return found


@pytest.mark.parametrize("secret", range(1, 8))
def test_halving_always_finds_the_number(secret: int) -> None:
    low, high, playing = 1, 7, game(secret)
    for _ in range(3):
        guess = (low + high) // 2
        turn = playing.turn(f"{guess}.")
        if turn.reply is None:
            break
        low, high = (guess + 1, high) if "higher" in str(turn.reply) else (low, guess - 1)
    assert guess == secret and turn == Turn(reward=1.0)


def test_an_answer_that_is_no_number_or_several_is_a_lost_try() -> None:
    playing = game(4)
    assert playing.turn("3 or 4") == playing.turn("no idea") == Turn("Answer with one number only. Guess again.")
    assert playing.turn("4 4") == Turn(note="it was 4")


def test_every_row_begins_a_game_whose_number_lies_in_its_range() -> None:
    from arriero.data.tasks import Hardness, guess_number

    for size in (1, 2, 5):
        row: dict[str, Any] = guess_number(random.Random(size), Hardness(size, 2))
        assert row["high"] - row["low"] == 2**size - 2 and f"from {row['low']} to {row['high']}." in row["prompt"]
        secrets = {GuessNumber(row, random.Random(i))._secret for i in range(300)}
        assert secrets == set(range(row["low"], row["high"] + 1))
    with pytest.raises(ConfigError, match="127 numbers of 2 digits are not there"):
        guess_number(random.Random(0), Hardness(7, 2))
