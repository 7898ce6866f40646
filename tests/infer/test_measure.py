"""The speeds of a model on this machine: what is counted, and what is advised."""

from __future__ import annotations

import pytest
import torch

from arriero.cli import main
from arriero.errors import ConfigError
from arriero.infer.config import BenchConfig
from arriero.infer.engine import Engine
from arriero.infer.measure import Speeds, choice, decode_speed, figure, measure, table, turns
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama

SHAPE = LlamaConfig(64, 2, 4, 2, 128, 131, 256, head_dim=32, tied_embeddings=True)


@pytest.fixture
def model():
    return Llama(SHAPE).init_weights(std=0.1).requires_grad_(False).to(torch.bfloat16).eval()


def test_every_type_is_measured_at_every_number_of_answers(model, tmp_path):
    config, seen = BenchConfig("x", prefill=40, new_tokens=5, rounds=2, batches=(1, 3)), []
    speeds = measure(model, config, lambda: seen.append(1))
    assert [s.kind for s in speeds] == ["bf16", "int8", "int4"] and len(seen) == turns(config) == 18
    assert all(s.prefill > 0 and list(s.decode) == [1, 3] and min(s.decode.values()) > 0 for s in speeds)
    assert speeds[2].weights < speeds[1].weights < speeds[0].weights
    assert model.tied, "the model that was given stays as it was"
    assert table(speeds, config).row_count == 3
    figure(speeds, config).savefig(tmp_path / "plot.svg")


def test_the_tokens_after_the_first_of_every_answer_are_counted(model, monkeypatch):
    engine, clock = Engine(model, max_running=4), iter([0.0, 2.0])
    monkeypatch.setattr("arriero.infer.measure.time.perf_counter", lambda: next(clock))
    assert decode_speed(engine, 4, 10, 0) == pytest.approx(4 * 10 / 2)


def test_a_type_is_advised_where_it_is_fast_enough_for_what_it_loses():
    def advice(**decode):
        return choice([Speeds(kind, 0, 1.0, {1: speed}) for kind, speed in decode.items()]).split(":")[0]

    assert advice(bf16=100.0, int8=105.0, int4=120.0) == "bf16"
    assert advice(bf16=100.0, int8=150.0, int4=160.0) == "int8"
    assert advice(bf16=100.0, int8=150.0, int4=250.0) == "int4"
    assert choice([Speeds("int4", 0, 1.0, {8: 3.0})]) == "int4 decodes fastest here."


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prefill": 256}, "prefill is 256; the model's context is 256"),
        ({"new_tokens": 250}, "new_tokens is 250; 32 more"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(model, wrong, says):
    with pytest.raises(ConfigError, match=says):
        measure(model, BenchConfig("x", **{"prefill": 9, **wrong}))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["--batches", "0"], "batches is (0,); give numbers of at least 1"),
        (["--plot", "x.gif"], "its name must end in .png"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(capsys, words, says):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "infer", "nothing-here", *words])
    assert says in " ".join(capsys.readouterr().err.split())


def test_eight_bits_of_bf16_alone_are_refused():
    with pytest.raises(ConfigError, match="activation_bits is 8, and types bf16 alone; it is of int8 and int4"):
        BenchConfig(model="m", types=("bf16",), activation_bits=8)
