"""Ghost attention's rows (Llama 2, arXiv 2307.09288, section 3.3): behind `arriero data build gatt`.

A dialogue gets an instruction that is to hold throughout (data/instructions.py). It is joined to every message of the
user while the answers are sampled, turn by turn, each after the answers before it; and kept in the first message alone
in the row that is learned. The loss is 0 on every token of earlier turns, the assistant's included: those answers were
sampled under an instruction that stood right before them, and the row does not show it. Half of the time the
instruction that is learned is the short form, as published.

Price: a generation of each turn, `tries` times; the instruction's tokens again at every turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from arriero.data.instructions import Dialogue, Messages, joined, obeys
from arriero.infer.request import Completion
from arriero.train.answering import Answering

FEWEST = 2  # turns of a dialogue that are worth keeping where a later one failed


def build_gatt(
    dialogues: Sequence[Dialogue], answering: Answering, obeyed: bool = False, tries: int = 1
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of the dialogues, their answers sampled under the instruction, and how many were left out and why.

    obeyed: an answer of which a rule says that it does not obey is none. tries: answers sampled at a turn, of which the
    first that has an end (and obeys) is taken. A dialogue ends before a turn that has none, and is left out where fewer
    than two turns would stay.
    """
    talks: list[Messages] = [[] for _ in dialogues]
    failed: dict[int, str] = {}
    for turn in range(max((len(d.turns) for d in dialogues), default=0)):
        asked = [i for i, d in enumerate(dialogues) if turn < len(d.turns) and i not in failed]
        for i in asked:
            talks[i].append({"role": "user", "content": joined(dialogues[i].instruction, dialogues[i].turns[turn])})
        for attempt in range(tries):
            label = f"turn {turn}" + (f", try {attempt}" if attempt else "")
            answers = answering([talks[i] for i in asked], label)
            left = {i: why for i, a in zip(asked, answers, strict=True) if (why := _fault(dialogues[i], a, obeyed))}
            for i, answer in zip(asked, answers, strict=True):
                if i not in left:
                    talks[i].append({"role": "assistant", "content": answer.text.strip()})
            asked = list(left)
            if not asked:
                break
        for i in asked:
            talks[i].pop()
            failed[i] = left[i]
    kept = [i for i, talk in enumerate(talks) if talk and (i not in failed or len(talk) >= 2 * FEWEST)]
    return [row(dialogues[i], talks[i]) for i in kept], Counter(why for i, why in failed.items() if i not in kept)


def _fault(dialogue: Dialogue, answer: Completion, obeyed: bool) -> str:
    """Why an answer cannot stand in a row; empty where it can."""
    if not (answer.stopped and answer.text.strip()):
        return "with a cut or empty answer"
    if obeyed and obeys(dialogue, answer.text.strip()) is False:
        return "with an answer that does not obey"
    return ""


def row(dialogue: Dialogue, sampled: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that is learned: the instruction in the first turn alone, the last answer alone trained."""
    messages: Messages = []
    for i, message in enumerate(sampled):
        if message["role"] == "user":
            text = dialogue.turns[i // 2]
            messages.append({"role": "user", "content": joined(dialogue.kept, text) if i == 0 else text})
        else:
            messages.append({**message, "train": i == len(sampled) - 1})
    meta = {"source": dialogue.where, "instructions": [i.long for i in dialogue.drawn], "shortened": dialogue.shortened}
    return {"messages": messages, "meta": meta}
