"""Obedience through a dialogue: the real model's own answers, asked one by one, and judged by hand."""

import json

import pytest
import torch
from rich.console import Console

from arriero.checkpoint.load import load
from arriero.data.instructions import BUILT_IN, Instruction, draw, obeys, read_dialogues
from arriero.errors import DataError
from arriero.eval import obedience
from arriero.eval.config import ObedienceConfig
from arriero.infer.config import SamplingConfig
from arriero.infer.generate import generate
from arriero.model.linear import densify
from arriero.tokenizer.chat import encode_chat

QUIET = Console(quiet=True)
ASKED = [["Name a colour.", "Name an animal.", "Name a river."], ["Say hi.", "Say bye."]]


@pytest.fixture
def dialogues(tmp_path):
    """The first ends with the user's turn, the second with an answer, which is of no matter."""
    rows = [[{"role": "user", "content": text} for text in turns] for turns in ASKED]
    first = [m for user in rows[0] for m in (user, {"role": "assistant", "content": "x"})][:-1]
    second = [m for user in rows[1] for m in (user, {"role": "assistant", "content": "x"})]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (first, second)))
    return path


def by_hand(path, config):
    """Whether each answer obeys: (dialogue, turn) -> bool, every answer from a forward of its whole conversation."""
    model, tokenizer = load("smollm2-135m", dtype=torch.float32)
    model = densify(model)
    found = {}
    for i, dialogue in enumerate(draw(read_dialogues(path), BUILT_IN, config.most, config.seed)):
        talk = []
        for turn, text in enumerate(dialogue.turns):
            asked = f"{dialogue.drawn[0].long}\n\n{text}" if turn == 0 or config.every_turn else text
            talk.append({"role": "user", "content": asked})
            ids = encode_chat(tokenizer, talk)
            (answer,) = generate(model, tokenizer, [ids], SamplingConfig(temperature=0.0), config.max_new_tokens)
            talk.append({"role": "assistant", "content": answer.text.strip()})
            found[i, turn] = dialogue.drawn[0].obeyed(answer.text.strip())
    return found


@pytest.mark.parametrize("every_turn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_turn_follows_the_models_own_answers_and_is_judged(dialogues, tmp_path, every_turn):
    config = ObedienceConfig(
        model="smollm2-135m", data=str(dialogues), max_new_tokens=12, precision="fp32", every_turn=every_turn, seed=3,
        out=str(tmp_path / "out"),
    )  # fmt: skip
    results = obedience.run_obedience(config, QUIET)
    wanted = by_hand(dialogues, config)
    later = [ok for (_, turn), ok in wanted.items() if turn]
    assert results.ratios["obeyed"].value == pytest.approx(sum(later) / len(later))
    assert results.ratios["obeyed in turn 1"].value == pytest.approx((wanted[0, 0] + wanted[1, 0]) / 2)
    assert results.ratios["obeyed in turn 3"].value == float(wanted[0, 2])
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["measures"]
    assert list(saved) == ["obeyed", *(f"obeyed in turn {turn}" for turn in (1, 2, 3))]


def test_what_always_obeys_counts_one_and_what_never_does_counts_nothing(dialogues, monkeypatch):
    config = ObedienceConfig(model="smollm2-135m", data=str(dialogues), max_new_tokens=3, examples=0)
    for rule, share in ((lambda text: True, 1.0), (lambda text: False, 0.0)):
        monkeypatch.setattr(obedience, "BUILT_IN", (Instruction("any", "Do.", "Do.", rule),))
        assert obedience.run_obedience(config, QUIET).ratios["obeyed"].value == share


def test_dialogues_of_one_turn_have_nothing_to_forget(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi."}]}))
    with pytest.raises(DataError, match="no dialogue has a second turn"):
        obedience.run_obedience(ObedienceConfig(model="smollm2-135m", data=str(path)), QUIET)


def test_the_instructions_of_a_dialogue_are_the_same_for_every_model(dialogues):
    talks = read_dialogues(dialogues)
    assert draw(talks, BUILT_IN, 1, 3) == draw(talks, BUILT_IN, 1, 3) != draw(talks, BUILT_IN, 1, 4)
    assert [d.turns for d in draw(talks, BUILT_IN, 1, 0)] == [tuple(turns) for turns in ASKED]
    assert all(obeys(d, "") is not None for d in draw(talks, BUILT_IN, 2, 0))
