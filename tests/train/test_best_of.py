"""Which answers are worth learning: by reward, over all rounds, past the guards."""

from __future__ import annotations

from arriero.eval.pass_at_k import pass_at_k
from arriero.train.best_of import Sampled, choose, statistics

FREE = {"keep": 1, "above": 0.0, "max_length_ratio": 0.0, "max_same": 1.0, "seed": 0}


def answer(prompt, text, value, tokens=5, finished=True, temperature=1.0, round=1, outcome="scored"):
    return Sampled(prompt, text, tokens, finished, temperature, round, value, outcome)


def texts(answers, **changes):
    return [found.text for found in choose(answers, **FREE | changes).chosen]


def test_the_best_answer_of_each_prompt_is_chosen_whatever_round_it_is_of():
    answers = [answer(0, "a", 0.2), answer(0, "b", 0.9, round=1), answer(0, "c", 0.5, round=2), answer(1, "d", 0.1)]
    assert texts(answers) == ["b", "d"]


def test_answers_that_are_cut_empty_crashed_or_not_good_enough_are_left_out_and_counted():
    answers = [
        answer(0, "cut", 1, finished=False), answer(1, " ", 1), answer(2, "low", 0.5),
        answer(3, "died", 1, outcome="crash"), answer(4, "good", 0.6),
    ]  # fmt: skip
    choice = choose(answers, **FREE | {"above": 0.5})
    assert [found.text for found in choice.chosen] == ["good"]
    assert choice.left_out == {
        "cut or empty": 2, "not above the threshold": 2, "prompts without an answer to learn": 4,
    }  # fmt: skip


def test_with_no_threshold_the_best_is_learned_even_where_it_is_negative():
    assert texts([answer(0, "a", -3.0), answer(0, "b", -2.0)], above=float("-inf")) == ["b"]


def test_several_answers_of_a_prompt_are_kept_if_they_differ():
    answers = [answer(0, "a", 1), answer(0, "a", 1), answer(0, "b", 0.5), answer(0, "c", 0.1)]
    assert texts(answers, keep=2) == ["a", "b"]
    assert texts(answers[:2], keep=2) == ["a"]


def test_an_answer_far_longer_than_the_others_is_not_chosen():
    answers = [answer(0, "short", 0.5, tokens=40), answer(0, "long", 1, tokens=400), answer(0, "other", 0.1, tokens=40)]
    assert texts(answers, max_length_ratio=4.0) == ["short"]
    assert texts(answers) == ["long"]
    brief = [answer(0, "12", 0.5, tokens=1), answer(0, "It is 12.", 1, tokens=6), answer(0, "3", 0.1, tokens=1)]
    assert texts(brief, max_length_ratio=4.0) == ["It is 12."]


def test_one_long_text_cannot_be_the_answer_to_everything():
    answers = [answer(i, "As a model I cannot say.", 1) for i in range(50)] + [
        answer(50 + i, f"text {i}", 1) for i in range(50)
    ]
    choice = choose(answers, **FREE | {"max_same": 0.05})
    assert len(choice.chosen) == 55
    assert choice.left_out == {"the same text as others": 45}
    short = [answer(i, "12", 1) for i in range(50)]
    assert len(texts(short, max_same=0.05)) == 50


def test_equal_rewards_favour_neither_length_nor_order():
    groups = [[answer(i, f"short {i}", 1, tokens=3), answer(i, f"a long one {i}", 1, tokens=9)] for i in range(400)]
    chosen = texts([a for group in groups for a in group])
    again = texts([a for group in reversed(groups) for a in reversed(group)])
    assert chosen == again
    assert 150 < sum(text.startswith("short") for text in chosen) < 250


def test_statistics_tell_each_temperature_apart():
    answers = [
        answer(0, "a", 1, temperature=0.7),
        answer(0, "b", 0, temperature=1.3),
        answer(1, "c", 0, temperature=1.3),
    ]
    told = statistics(answers, choose(answers, **FREE))
    assert told["temperatures"]["0.7"] == {"answers": 1, "mean_reward": 1, "finished": 1, "different": 1, "chosen": 1}
    assert told["temperatures"]["1.3"]["mean_reward"] == told["temperatures"]["1.3"]["chosen"] == 0
    assert (told["chosen"], told["outcomes"], told["chosen_of_round"]) == (1, {"scored": 3}, {"1": 1})


def test_pass_at_k_is_unbiased():
    """Its mean over all ways to draw n answers of a model that is right with p is 1 - (1 - p)^k."""
    from math import comb

    p, n = 0.3, 7
    for k in (1, 2, 5, 7):
        expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert abs(expected - (1 - (1 - p) ** k)) < 1e-12
