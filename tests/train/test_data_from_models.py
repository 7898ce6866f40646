"""Ghost attention and context distillation: what is sampled under, what is learned, and which tokens are trained."""

from __future__ import annotations

import json

import pytest

from arriero import cli
from arriero.data.formats import parse_records
from arriero.data.instructions import BUILT_IN, Instruction, draw, obeys
from arriero.data.prompts import Prompt, Prompts
from arriero.data.sft_cache import encode_conversation
from arriero.errors import DataError
from arriero.infer.request import Completion
from arriero.io.records import read_records
from arriero.rewards.base import Score, Verifier
from arriero.tokenizer import load_tokenizer
from arriero.train.context_distillation import build_distill
from arriero.train.ghost_attention import build_gatt

TALK = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
LOUD = Instruction("case", "Write in capitals.", "Capitals.", str.isupper)


class Known:
    """Answers each conversation with its number of messages, and keeps what it was asked. cut: answers without end."""

    def __init__(self, cut=()):
        self.asked, self.cut = [], cut

    def __call__(self, conversations, label=""):
        self.asked += [[dict(message) for message in talk] for talk in conversations]
        kinds = ("length" if (label, i) in self.cut else "stop" for i in range(len(conversations)))
        return [Completion([1], f" {label}: {len(t)} ", kind) for t, kind in zip(conversations, kinds, strict=True)]


def test_the_instruction_is_joined_to_every_turn_that_is_sampled_and_kept_in_the_first_that_is_learned():
    model = Known()
    ((row,), _) = build_gatt(draw([(TALK, "row 1")], [LOUD], 1, seed=1), model)
    users = [m["content"] for m in model.asked[-1] if m["role"] == "user"]
    assert users == [f"Write in capitals.\n\nuser {i}" for i in range(3)]
    assert [m["content"] for m in model.asked[-1] if m["role"] == "assistant"] == ["turn 0: 1", "turn 1: 3"]
    learned = [m["content"] for m in row["messages"] if m["role"] == "user"]
    assert learned[1:] == ["user 1", "user 2"]
    assert learned[0] in ("Write in capitals.\n\nuser 0", "Capitals.\n\nuser 0")
    assert row["meta"]["shortened"] == learned[0].startswith("Capitals")


def test_no_token_of_an_earlier_turn_is_trained(tmp_path, smollm2_gguf):
    ((row,), _) = build_gatt(draw([(TALK, "row 1")], [LOUD], 1, seed=1), Known())
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    tokenizer = load_tokenizer(smollm2_gguf)
    (conversation,) = parse_records(read_records(tmp_path / "rows.jsonl"))
    ids, trained = encode_conversation(tokenizer, conversation)
    learned = tokenizer.decode([i for i, on in zip(ids, trained, strict=True) if on])
    assert learned.startswith("turn 2: 5")
    assert "turn 1" not in learned


def test_the_short_form_is_learned_half_of_the_time_and_kinds_are_joined_at_random():
    dialogues = draw([(TALK, "")] * 400, BUILT_IN, 2, seed=0)
    assert 160 < sum(d.shortened for d in dialogues) < 240
    assert 160 < sum(len(d.drawn) == 2 for d in dialogues) < 240
    assert all(len({i.kind for i in d.drawn}) == len(d.drawn) for d in dialogues)
    assert {i.long for d in dialogues for i in d.drawn} == {i.long for i in BUILT_IN}
    assert dialogues == draw([(TALK, "")] * 400, BUILT_IN, 2, seed=0)


def test_a_dialogue_with_an_answer_that_was_cut_is_left_out():
    dialogues = draw([(TALK, "a"), (TALK[:2], "b"), (TALK, "c")], [LOUD], 1, 0)
    rows, left_out = build_gatt(dialogues, Known(cut={("turn 1", 0)}))
    assert left_out == {"with a cut or empty answer": 1}
    assert [row["meta"]["source"] for row in rows] == ["b", "c"]
    assert [len(row["messages"]) for row in rows] == [2, 6]


def test_dialogues_that_do_not_obey_are_left_out_where_that_is_asked_for():
    dialogues = draw([(TALK[:2], "a")], [LOUD], 1, 0)
    assert build_gatt(dialogues, Known(), obeyed=True) == ([], {"with an answer that does not obey": 1})
    quiet = Instruction("case", "Write in small letters.", "Small.", str.islower)
    assert len(build_gatt(draw([(TALK, "a")], [quiet], 1, 0), Known(), obeyed=True)[0]) == 1


class Stubborn(Known):
    """Obeys at the second try, and from the third turn on never."""

    def __call__(self, conversations, label=""):
        loud = "try 1" in label and "turn 2" not in label
        texts = ["LOUD" if loud else "quiet"] * len(conversations)
        self.asked.append(label)
        return [Completion([1], text, "stop") for text in texts]


def test_the_first_answer_that_obeys_is_taken_and_a_dialogue_ends_before_one_that_never_does():
    model = Stubborn()
    ((row,), left_out) = build_gatt(draw([(TALK, "a")], [LOUD], 1, 0), model, obeyed=True, tries=3)
    assert [m["content"] for m in row["messages"] if m["role"] == "assistant"] == ["LOUD", "LOUD"]
    assert [m.get("train") for m in row["messages"] if m["role"] == "assistant"] == [False, True]
    assert not left_out
    assert model.asked[-3:] == ["turn 2", "turn 2, try 1", "turn 2, try 2"]
    assert build_gatt(draw([(TALK, "a")], [LOUD], 1, 0), Stubborn(), obeyed=True, tries=1)[1].total() == 1


def test_a_dialogue_with_a_system_message_is_refused():
    with pytest.raises(DataError, match="row 4: it has messages of a system or a tool"):
        draw([([{"role": "system", "content": "x"}, *TALK], "row 4")], [LOUD], 1, 0)


@pytest.mark.parametrize(
    ("text", "wanted"), [("YES, LLAMA.", {"case", "word", "length"}), ("Well. Then. Amigo!", {"start", "word"})]
)
def test_rules_tell_whether_an_answer_obeys(text, wanted):
    for instruction in BUILT_IN:
        (dialogue,) = draw([(TALK, "")], [instruction], 1, 0)
        if obeys(dialogue, text):
            assert instruction.kind in wanted, instruction
    assert any(obeys(draw([(TALK, "")], [i], 1, 0)[0], text) for i in BUILT_IN if i.kind in wanted)


class Longer(Verifier):
    """More for a longer text."""

    def verify(self, answer):
        return Score(float(answer.text.count("under")))


def prompts(*fields):
    return Prompts([Prompt((1,), [{"role": "user", "content": f"q{i}"}], f, "f", i) for i, f in enumerate(fields)])


def test_the_row_has_the_answer_under_the_preprompt_without_it():
    model = Known()
    rows, left_out = build_distill(prompts({}, {}), {"": "Be careful."}, model, None)
    assert model.asked[0][0] == {"role": "system", "content": "Be careful."}
    assert rows[0]["prompt"] == [{"role": "user", "content": "q0"}]
    assert rows[0]["completion"] == "under: 2"
    assert not left_out


def test_a_row_is_kept_only_where_the_reward_prefers_it_and_the_answer_has_an_end():
    rows, left_out = build_distill(prompts({}, {}), {"": "x"}, Known(cut={("under", 1)}), Longer())
    assert [row["meta"]["reward"] for row in rows] == [1]
    assert left_out == {"cut or empty": 1}

    class Same(Longer):
        def verify(self, answer):
            return Score(0.5)

    assert build_distill(prompts({}), {"": "x"}, Known(), Same())[1] == {"not preferred": 1}


def test_each_category_has_its_own_preprompt():
    model = Known()
    build_distill(prompts({"category": "a"}, {"category": "b"}), {"a": "A.", "": "All."}, model, None)
    assert [talk[0]["content"] for talk in model.asked] == ["A.", "All."]
    with pytest.raises(DataError, match="there is no preprompt for the category 'legl'; did you mean 'legal'"):
        build_distill(prompts({"category": "legl"}), {"legal": "A."}, model, None)


@pytest.mark.slow
def test_the_commands_write_rows_that_sft_reads(toy_model, tmp_path, own_cache, capsys):
    data, out = tmp_path / "d.jsonl", tmp_path / "o.jsonl"
    data.write_text(json.dumps({"messages": TALK[:2]}) + "\n")
    line = ["data", "build", "gatt", str(toy_model), str(data), str(out), "--max-new-tokens", "3"]
    assert cli.main(line) == 2  # the toy never ends an answer
    assert "no dialogue is worth learning (1 with a cut or empty answer)" in capsys.readouterr().err
