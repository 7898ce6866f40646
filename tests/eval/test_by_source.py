"""Bits per byte by source, by hand: a model of 128 equal tokens, whatever it reads, pays 7 bits for each."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from arriero.eval import run
from arriero.eval.bootstrap import mean
from arriero.eval.config import EvalConfig
from arriero.eval.results import Results, measures_table
from arriero.eval.run import run_eval
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.show.terminal import output

Evaluated = Callable[..., dict[str, Any]]


class Characters:
    """An id a character, of its UTF-8 bytes."""

    eos_id = None

    def __init__(self, bos_id: int | None) -> None:
        self.bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        self.text = text
        return [3 + ord(character) % 97 for character in text]

    def text_bytes(self, ids: list[int], total: int) -> np.ndarray:
        return np.array([len(character.encode()) for character in self.text])


@pytest.fixture
def evaluated(tmp_path, monkeypatch) -> Evaluated:
    """Rows -> what results.json says of a model that finds all tokens equally probable."""
    model = Llama(LlamaConfig(22, 1, 11, 11, 29, 128, 16)).init_weights(seed=3)
    model.head.weight.data.zero_()
    monkeypatch.setattr(run, "resolve", lambda name: None)

    def evaluate(rows: list[dict[str, Any]], bos_id: int | None = 1, **settings: Any) -> dict[str, Any]:
        monkeypatch.setattr(run, "load", lambda *args, **kwargs: (model, Characters(bos_id)))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = EvalConfig("m", str(tmp_path / "rows.jsonl"), task="perplexity", resamples=100, precision="fp32")
        run_eval(replace(config, out=str(tmp_path / "out"), **settings))
        return json.loads((tmp_path / "out" / "results.json").read_text())["measures"]

    return evaluate


ROWS = [
    {"text": "é€", "source": "prose"},  # 2 tokens of 2 and 3 bytes
    {"text": "abcdefghijklmnopqrstu", "source": "code"},  # 21 of one byte, in two windows of 16
    {"text": "", "source": "empty"},
    {"text": "€a", "source": "prose"},  # 3 and 1
    {"text": "ab", "source": None},
]


def test_a_source_costs_its_bits_over_the_bytes_of_its_own_tokens(evaluated, capsys):
    found = evaluated(ROWS)
    by_hand = {
        "bits_per_byte": 7 * 27 / 32,
        "bits_per_byte_code": 7,
        "bits_per_byte_prose": 7 * 4 / 9,
        "bits_per_byte_documents": 7,
    }
    values = {key: measure["value"] for key, measure in found.items() if "byte" in key}
    assert values == pytest.approx(by_hand)
    assert list(values) == list(by_hand)  # the largest first
    shown = " ".join(capsys.readouterr().out.split())
    assert "bits per byte: prose │ 3.111 │ " in shown and "bits per byte: documents │ 7.000 │ one row only" in shown


def test_a_first_token_that_nothing_predicts_counts_in_no_source(evaluated):
    found = evaluated(ROWS, bos_id=None)  # of prose, € (3 bytes) and a (1) are predicted
    assert found["bits_per_byte_prose"]["value"] == pytest.approx(7 * 2 / 4)


@pytest.mark.parametrize("source", [{}, {"source": "one"}, {"source": None}])
def test_with_one_source_or_none_there_is_nothing_to_tell_apart(evaluated, source):
    found = evaluated([{"text": "ab", **source}, {"text": "é", **source}])
    assert list(found) == ["bits_per_token", "bits_per_byte", "perplexity"]


def test_sources_of_two_models_are_compared(evaluated, capsys):
    found = evaluated(ROWS, compare_with="other")
    assert found["bits_per_byte_prose"]["before"]["value"] == pytest.approx(7 * 4 / 9)
    assert found["bits_per_byte_prose"]["difference"]["value"] == 0
    assert "bits per byte: code" in capsys.readouterr().out


def test_a_table_shows_the_largest_sources_and_names_as_text(capsys):
    ratios = {"bits_per_byte": mean([1.0])} | {f"bits_per_byte_[red]{i}\x1b": mean([1.0]) for i in range(23)}
    for before in (None, Results("b", dict(list(ratios.items())[:-1]), [], 23, 0.0)):
        output().print(measures_table(before, Results("m", ratios, [], 23, 0.0), 100, 0))
        shown = capsys.readouterr().out
        assert "[red]19" in shown and "[red]20" not in shown and "\x1b" not in shown
        assert ("3 more are in results.json" if before is None else "2 more are in results.json") in " ".join(
            shown.split()
        )
