"""Answers by a server: in fp32 those of an engine in this process, bit for bit; what cannot be used is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'arriero[serve]'")

from helpers.answering import ByRule, Killed, assert_equal_runs, grpo_settings, killed_in, train_grpo
from helpers.serving import Running

from arriero.errors import ConfigError, TrainingError, UserError
from arriero.serve.config import ServeConfig
from arriero.show.terminal import notes
from arriero.tokenizer.load import load_tokenizer
from arriero.train import grpo
from arriero.train.served_sampler import KEY, completion

SECRET = "a secret of this test"


@pytest.fixture(scope="module")
def server(toy_model: Path) -> Iterator[Running]:
    with Running(ServeConfig(model=(f"toy={toy_model}",), port=0, precision="fp32", api_key=SECRET)) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)


def sampler_of(config: Any) -> Any:
    return grpo.build(config, notes(quiet=True), None, ByRule()).prepared.rollouts.sampler


@pytest.mark.parametrize("lag", [0, 1])
def test_a_server_gives_the_bits_of_this_process_and_so_does_a_killed_run(
    toy_model: Path, prompts: Path, tmp_path: Path, server: Running, lag: int
) -> None:
    train_grpo(grpo_settings(toy_model, prompts, tmp_path / "here", steps=3, rollout_lag=lag))
    config = grpo_settings(toy_model, prompts, tmp_path / "served", steps=3, rollout=server.url, rollout_lag=lag)
    with pytest.raises(Killed):
        train_grpo(config, killed_in("step", 1))
    train_grpo(dataclasses.replace(config, resume=True))
    assert_equal_runs(tmp_path / "here", tmp_path / "served")
    left = [name for name in server.server.models.names if name.startswith("arriero-")]
    assert len(left) <= 2 * (lag + 1), "each unloads the one before"


def test_log_probabilities_before_the_temperature_are_refused(
    toy_model: Path, prompts: Path, tmp_path: Path, server: Running
) -> None:
    config = grpo_settings(toy_model, prompts, tmp_path / "run", rollout=server.url, temperature=0.7)
    with pytest.raises(ConfigError, match=r"temperature is 0.7, and .* before it; start vLLM with --logprobs-mode"):
        sampler_of(config)


def test_all_weights_cannot_be_sent(toy_model: Path, prompts: Path, tmp_path: Path, server: Running) -> None:
    config = dataclasses.replace(grpo_settings(toy_model, prompts, tmp_path / "run", rollout=server.url), method="full")
    with pytest.raises(ConfigError, match="method full: a server is sent adapters; set method to lora"):
        sampler_of(config)


def test_a_server_that_is_not_there_or_wants_another_key_is_named(
    toy_model: Path, prompts: Path, tmp_path: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nothing that serves a model answers at http://127.0.0.1:9 .*vllm serve"):
        sampler_of(grpo_settings(toy_model, prompts, tmp_path / "run", rollout="http://127.0.0.1:9"))
    monkeypatch.setenv(KEY, "another")
    with pytest.raises(UserError, match=r"refuses .401.*OPENAI_API_KEY has to hold the server's key"):
        sampler_of(grpo_settings(toy_model, prompts, tmp_path / "run", rollout=server.url))


def test_another_base_stops_the_run_in_its_first_step(
    toy_model: Path, prompts: Path, tmp_path: Path, smollm2_gguf: Path
) -> None:
    with (
        Running(ServeConfig(model=(f"base={smollm2_gguf}",), port=0, precision="fp32", api_key=SECRET)) as other,
        pytest.raises(TrainingError, match=r"load_lora_adapter refuses|differ"),
    ):
        train_grpo(grpo_settings(toy_model, prompts, tmp_path / "run", steps=1, rollout=other.url))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"token_ids": None}, "no ids of the tokens"),
        ({"logprobs": None}, "not a log-probability of each"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "not a log-probability of each"),
        ({"token_ids": [70, 71]}, "ended an answer at token 71, which ends none here"),
    ],
)
def test_an_answer_without_what_training_needs_is_refused(smollm2_gguf: Path, changed: Any, said: str) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    end = min(tokenizer.stop_ids)
    choice = {"token_ids": [70, end], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop"}
    found = completion(choice, [end], tokenizer)
    assert (found.ids, found.text, found.stopped_by) == ([70], tokenizer.decode([70]), end)
    assert [p.sampled for p in found.logprobs or ()] == [-1.0, -2.0]
    with pytest.raises(ConfigError, match=said):
        completion(choice | changed, [end], tokenizer)
