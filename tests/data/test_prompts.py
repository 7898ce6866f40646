"""Prompt rows: read as strictly as conversations, rendered as at inference, taken as a pure function of the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.checkpoint.load import load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.data.prompts import read_prompts, read_split
from arriero.errors import DataError
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer_at(resolve(str(smollm2_gguf)))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_are_those_of_inference_and_other_columns_are_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "What is 2 + 3?", "answer": "5", "metadata": {"level": 1}},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "answer": 0},
        {"system": "Be brief.", "question": "Hi", "answer": "x"},
    ]
    first, second, third = read_prompts(write(tmp_path / "p.jsonl", rows), tokenizer, max_length=100)
    assert list(first.ids) == encode_chat(tokenizer, [{"role": "user", "content": "What is 2 + 3?"}])
    assert first.fields == {"answer": "5", "metadata": {"level": 1}} and first.row == 1
    assert second.ids == third.ids and second.fields == {"answer": 0}
    assert list(second.ids) == encode_chat(tokenizer, rows[1]["messages"])
    assert first.text == "What is 2 + 3?" and second.text == "system: Be brief.\n\nuser: Hi"


def test_raw_prompts_are_plain_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [prompt] = read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "Once"}]), tokenizer, max_length=100, raw=True)
    assert list(prompt.ids) == [*tokenizer.begin_ids, *tokenizer.encode("Once")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "5"}, "row 2 of .*no prompt in its columns"),
        ({"Prompt": "x"}, "did you mean 'prompt' by 'Prompt'"),
        ({"prompt": "  "}, "no prompt"),
        ({"prompt": 3.5, "messages": [{"role": "user", "content": "x"}]}, "all say what is asked"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "ends with the assis",
        ),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "unknown role"),
        ({"prompt": True}, "write the word"),
    ],
)
def test_rows_that_ask_nothing_are_refused_with_their_place(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "fine"}, row]), tokenizer, max_length=100)


def test_long_prompts_are_an_error_unless_they_are_few(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "short"}] * 9 + [{"prompt": "long " * 100}])
    with pytest.raises(DataError, match=r"row 10 of .* tokens, and at most 50 fit .*10.0%"):
        read_prompts(path, tokenizer, max_length=50)
    assert len(read_prompts(path, tokenizer, max_length=50, max_truncated=0.1)) == 9


def test_steps_take_every_prompt_once_an_epoch_and_any_step_is_known_at_once(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": f"number {i}"} for i in range(11)])
    prompts = read_prompts(path, tokenizer, max_length=100)
    steps = [prompts.taken(3, 5 * step, 5) for step in range(11)]
    flat = [i for step in steps for i in step]
    epochs = [flat[11 * e : 11 * (e + 1)] for e in range(5)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] and steps[7] == prompts.taken(3, 35, 5) and steps != prompts.taken(4, 0, 5)
    assert len(prompts.taken(3, 4, 40)) == 40


def test_held_out_prompts_differ_by_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"number {i % 40}", "answer": i} for i in range(80)]
    path = write(tmp_path / "p.jsonl", rows)
    training, held_out = read_split(path, "0.25", tokenizer, max_length=100)
    assert held_out is not None and len(training) + len(held_out) == 80
    assert not {p.text for p in training} & {p.text for p in held_out} and len(held_out) % 2 == 0
    other = write(tmp_path / "v.jsonl", [{"prompt": "Number  3"}])
    training, held_out = read_split(path, str(other), tokenizer, max_length=100)
    assert len(training) == 78 and "number 3" not in {p.text for p in training}
    with pytest.raises(DataError, match="also held out"):
        read_split(other, str(other), tokenizer, max_length=100)
