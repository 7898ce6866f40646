"""Preferences: every layout gives the same rows, ids are fine-tuning's, and what cannot be compared is refused."""

import json

import numpy as np
import pytest

from arriero.data.formats import parse_record
from arriero.data.preference_formats import RATINGS, parse_preference
from arriero.data.preferences import (
    build_preference_splits,
    build_preferences,
    holds_preferences,
    preference_stats,
)
from arriero.errors import DataError
from arriero.io.records import Record, read_records
from arriero.tokenizer.chat import encode_chat, encode_training

from .conftest import turns, write_rows
from .test_sft import CHATML, with_template

Q, GOOD, BAD = "How many legs has a llama?", "Four.", "It has five legs."
USER = {"role": "user", "content": Q}


def answer(text):
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    {"question": Q, "chosen": GOOD, "rejected": BAD},
    {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD},
    {"prompt": [USER], "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
    {"messages": [USER], "chosen": answer(GOOD), "rejected": answer(BAD)},
    {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    {"chosen": turns(Q, GOOD), "rejected": turns(Q, BAD)},
    {"prompt": Q, "chosen": turns(Q, GOOD), "rejected": turns(Q, BAD)},
    {"chosen": json.dumps(turns(Q, GOOD)), "rejected": json.dumps(turns(Q, BAD))},
    {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}",
    },
    {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {GOOD}".strip(), "rejected": BAD},
]


def parsed(row):
    return parse_preference(Record("r.jsonl", 1, row, 1.0))


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(*rows, **settings):
        return build_preferences(write_rows(tmp_path / "r.jsonl", list(rows)), tokenizer, **settings)

    return build


@pytest.mark.parametrize("row", PAIRS, ids=range(len(PAIRS)))
def test_every_layout_of_a_pair_is_the_same_preference(row, tmp_path):
    [record] = read_records(write_rows(tmp_path / "r.jsonl", [row]))
    found = parse_preference(record)
    assert (found.prompt, found.kind, found.values) == ([USER], "pair", (1.0, 0.0))
    assert found.answers == ([answer(GOOD)], [answer(BAD)])


def test_ids_of_a_side_are_those_of_fine_tuning_on_the_same_text(build, tokenizer):
    row = {"system": "Be brief.", "prompt": turns("a?", "b", "c?"), "chosen": "Two\nlines.", "rejected": "<|im_end|>"}
    dataset = build(row)
    prompt = [{"role": "system", "content": "Be brief."}, *turns("a?", "b", "c?")]
    prompt[2]["train"] = 0
    for side, text in zip(dataset.of_row(0), ("Two\nlines.", "<|im_end|>"), strict=True):
        expected = encode_training(tokenizer, [*prompt, answer(text)])
        assert dataset.answers.tokens(side).tolist() == expected.ids
        assert dataset.answers.trained(side).tolist() == expected.trained
        asked = encode_chat(tokenizer, prompt)
        assert expected.ids[: len(asked)] == asked and dataset.prompt(0) == len(asked) - 1
        assert [i for i, t in zip(expected.ids, expected.trained, strict=True) if t][-1] in tokenizer.stop_ids


def test_only_what_differs_of_two_dialogues_is_the_answer(build, tokenizer):
    dataset = build({"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e", "f", "g")})
    ids = [dataset.answers.tokens(s)[dataset.answers.trained(s)].tolist() for s in dataset.of_row(0)]
    assert [tokenizer.decode(i, skip_special=False) for i in ids] == ["d<|im_end|>", "e<|im_end|>g<|im_end|>"]


def test_an_edited_answer_is_better_than_the_chosen_one():
    row = parsed({"prompt": Q, "edited": "Four legs.", "chosen": GOOD, "rejected": BAD, "chosen_safe": True})
    assert (row.kind, row.names, row.values) == ("ranked", ("edited", "chosen", "rejected"), (2.0, 1.0, 0.0))
    assert row.safe == (-1, 1, -1)
    assert parsed({"prompt": Q, "edited": None, "chosen": GOOD, "rejected": BAD}).kind == "pair"


def test_lists_are_ranked_by_their_order_or_by_scores(build):
    ranked = parsed({"prompt": Q, "ranked": ["a", "b", "c"], "safe": [True, None, False]})
    assert ranked.values == (2.0, 1.0, 0.0) and ranked.safe == (1, -1, 0)
    rows = [
        {"prompt": Q, "completions": ["a", "b", "c"], "scores": [0.5, -1, 0.5]},
        {"prompt": "p", "responses": ["a", "b"], "rewards": [1, 1]},
    ]
    dataset = build(*rows)
    assert dataset.values.tolist() == [0.5, -1, 0.5, 1, 1] and dataset.comparable.tolist() == [True, False]
    assert preference_stats(dataset).pairs == 2 and dataset.best(0) == 0


def test_an_answer_with_a_label_needs_no_other(build):
    dataset = build({"prompt": Q, "completion": GOOD, "label": True}, {"prompt": Q, "completion": BAD, "label": False})
    assert dataset.values.tolist() == [1, 0] and dataset.counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("written", "level"),
    [
        ("significantly better", 0),
        ("Significantly_Better", 0),
        (3, 0),
        ("2", 1),
        ("slightly", 2),
        ("unsure", 3),
        (0, 3),
    ],
)
def test_llama_2s_levels_are_read_as_words_and_numbers(written, level):
    assert parsed({**PAIRS[0], "rating": written}).rating == level
    assert RATINGS[0] == "significantly better" and parsed(PAIRS[0]).rating == -1


def test_a_prompt_is_counted_once_and_held_out_as_a_whole(tmp_path, tokenizer):
    rows = [{"prompt": f"Count to {i // 3}.", "chosen": f"{i} is it", "rejected": "no"} for i in range(90)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    training, held_out = build_preference_splits(path, "0.2", tokenizer, max_length=100)
    assert held_out is not None and not set(training.hashes) & set(held_out.hashes)
    assert len(training) + len(held_out) == 90 and len(held_out) % 3 == 0
    p, sides = training.prompt(0), training.of_row(0)
    assert training.lengths[0] == p + sum(len(training.answers.tokens(s)) - p for s in sides)
    assert held_out.conversations([0])[0].messages[-1]["content"] == rows[int(held_out.index[0])]["chosen"]
    again = build_preferences(path, tokenizer)
    assert np.array_equal(again.select(training.index).lengths, training.lengths)
    with pytest.raises(DataError, match=r"row 1 of .*: \d+ tokens do not fit 10, and neither do 100.0% of the rows"):
        build_preferences(path, tokenizer, max_length=10)


def test_preferences_and_conversations_are_told_apart(tmp_path):
    assert all(holds_preferences(write_rows(tmp_path / "p.jsonl", [row])) for row in PAIRS)
    assert not holds_preferences(write_rows(tmp_path / "c.jsonl", [{"messages": turns(Q, GOOD)}]))
    with pytest.raises(DataError, match="`arriero dpo` and `arriero reward` learn from both"):
        parse_record(Record("r.jsonl", 1, PAIRS[0], 1.0))


REFUSED = {
    "identical": ({"prompt": Q, "chosen": GOOD, "rejected": " Four. "}, "'chosen' and 'rejected' are one answer"),
    "same dialogue": ({"chosen": turns(Q, GOOD), "rejected": turns(Q, GOOD)}, "are the same dialogue"),
    "prompts": ({"chosen": turns("a?", GOOD), "rejected": turns("b?", BAD)}, "have different prompts: message 0"),
    "later prompts": (
        {"chosen": turns(Q, GOOD, "x", "y"), "rejected": turns(Q, GOOD, "z", "y")},
        "have different prompts: message 2 of 'chosen' differs",
    ),
    "beginning": (
        {"chosen": turns(Q, GOOD), "rejected": turns(Q, GOOD, "x", "y")},
        "'chosen' is the beginning of the other dialogue",
    ),
    "another prompt": (
        {"prompt": "Other?", "chosen": turns(Q, GOOD), "rejected": turns(Q, BAD)},
        "'prompt' is not in what 'chosen' and 'rejected' begin with",
    ),
    "no prompt": ({"chosen": GOOD, "rejected": BAD}, "have no prompt; add 'prompt'"),
    "empty prompt": ({"prompt": " ", "chosen": GOOD, "rejected": BAD}, "'prompt' is empty"),
    "empty side": ({"prompt": Q, "chosen": "", "rejected": BAD}, "'chosen' is empty; write the answer"),
    "one side": ({"prompt": Q, "chosen": GOOD}, "'rejected' is missing, or null here"),
    "mixed": ({"prompt": Q, "chosen": turns(Q, GOOD), "rejected": BAD}, "write both in one way"),
    "no answer": ({"prompt": Q, "chosen": [answer(GOOD), USER], "rejected": BAD}, "the last message of the answer is"),
    "rating": ({**PAIRS[0], "rating": "great"}, "'rating' is 'great'; give one of 'significantly better'"),
    "margin": ({**PAIRS[0], "margin": -1}, "'margin' is -1, as if 'rejected' were better; swap"),
    "safe": ({**PAIRS[0], "chosen_safe": "yes"}, "'chosen_safe' is 'yes'; give true"),
    "few": ({"prompt": Q, "ranked": ["a"]}, "'ranked' has 1 answers, and two at least can be"),
    "scores": ({"prompt": Q, "completions": ["a", "b"], "scores": [1]}, "has 2 entries and 'scores' 1"),
    "nan": ({"prompt": Q, "completions": ["a", "b"], "scores": [1, "x"]}, "'scores' holds 'x', which is no finite"),
    "twice": ({"prompt": Q, "completions": ["a", "a"], "scores": [1, 2]}, "are one answer, so neither is better"),
    "lost": ({**PAIRS[0], "context": "A llama lost a leg."}, "'context' stands beside 'chosen', and would be lost"),
    "lost beside an instruction": (
        {"instruction": Q, "input": "A llama.", "context": "It lost a leg.", "chosen": GOOD, "rejected": BAD},
        "'context' stands beside 'chosen', and would be lost",
    ),
    "case": ({**PAIRS[0], "Rating": "better"}, "the column 'Rating' is not known; did you mean 'rating'?"),
    "label": ({"prompt": Q, "completion": GOOD, "label": "good"}, "'label' has to be true or false"),
    "unknown": ({"prompt": Q, "good": GOOD}, "no preference in its columns"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_with_its_place(case, build, tmp_path):
    row, message = REFUSED[case]
    with pytest.raises(DataError) as refused:
        build(PAIRS[0], row)
    assert str(refused.value).startswith(f"row 2 of {tmp_path / 'r.jsonl'}: ") and message in str(refused.value)


def test_a_template_that_never_ends_an_answer_is_refused_with_the_side(tmp_path, tokenizer):
    path = write_rows(tmp_path / "r.jsonl", [PAIRS[0]])
    with pytest.raises(
        DataError, match=r"row 1 of .*r.jsonl: 'chosen': message 1 \(assistant\): .* never learn to stop"
    ):
        build_preferences(path, with_template(tokenizer, CHATML.replace("END", "'\\n'")))


def test_a_template_that_looks_ahead_is_refused(tmp_path, tokenizer):
    source = "{% if messages[-1].content == 'Four.' %}x{% endif %}" + CHATML.replace("END", "'<|im_end|>'")
    path = write_rows(tmp_path / "r.jsonl", [{**PAIRS[0], "chosen": BAD, "rejected": "No."}, PAIRS[0]])
    with pytest.raises(DataError, match=r"row 2 of .*"):
        build_preferences(path, with_template(tokenizer, source))


def test_columns_that_are_not_read_are_named_once(build, fresh_warnings):
    build({**PAIRS[0], "id": 7, "score_chosen": 8.5})
    assert any("'id', 'score_chosen'" in said for said in fresh_warnings())
