"""Answers by a worker in another process: the same bits, with a lag too, and after a kill."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.answering import ByRule, Killed, assert_equal_runs, grpo_settings, killed_in, train_grpo

from arriero.errors import CheckpointError, ConfigError
from arriero.show.terminal import notes
from arriero.train import grpo
from arriero.train.metrics import surviving_records
from arriero.train.rl_config import RolloutConfig

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: arriero[ray]")


@pytest.fixture
def local_ray() -> Iterator[None]:
    """A cluster that the first run starts, stopped at the end."""
    yield
    import ray

    ray.shutdown()


# -- the lag, in one process -------------------------------------------------------------------------------------------


def test_with_a_lag_answers_are_by_the_weights_of_so_many_steps_before(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    train_grpo(grpo_settings(toy_model, prompts, tmp_path / "run", rollout_lag=2))
    rows = [surviving_records(p)[0] for p in sorted((tmp_path / "run" / "rollouts").iterdir())]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["weights"]["step"] for row in rows] == [0, 0, 0, 1, 2]
    assert len({row["weights"]["checksum"] for row in rows}) == 3
    steps = [r for r in surviving_records(tmp_path / "run" / "metrics.jsonl") if "event" not in r]
    assert [r["behind"] for r in steps] == [0, 1, 2, 2, 2]
    assert steps[0]["mismatch"] < 1.001 < steps[-1]["mismatch"]  # of other weights: no reason to stop


@pytest.mark.parametrize(("part", "at"), [("sampled", 5), ("step", 2)])
def test_a_run_with_a_lag_is_killed_and_goes_on_to_the_same_bits(
    toy_model: Path, prompts: Path, tmp_path: Path, part: str, at: int
) -> None:
    train_grpo(grpo_settings(toy_model, prompts, tmp_path / "whole", rollout_lag=2))
    config = grpo_settings(toy_model, prompts, tmp_path / "killed", rollout_lag=2)
    with pytest.raises(Killed):
        train_grpo(config, killed_in(part, at))
    train_grpo(dataclasses.replace(config, resume=True))
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_answers_that_are_gone_with_their_weights_are_said_to_be(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    config = grpo_settings(toy_model, prompts, tmp_path / "run", rollout_lag=2)
    with pytest.raises(Killed):
        train_grpo(config, killed_in("step", 2))
    (tmp_path / "run" / "rollouts" / "step-00000004-0.jsonl").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-00000004-0.jsonl is not what the run left there: .* begin a new run"
    ):
        train_grpo(dataclasses.replace(config, resume=True))


def test_what_cannot_lag_is_refused() -> None:
    with pytest.raises(ConfigError, match="rollout_lag is 1 and dynamic 2: further rounds would wait"):
        RolloutConfig(rollout_lag=1, dynamic=2)
    with pytest.raises(ConfigError, match="rollout is 'there'; it is here, ray, ray:HOST:PORT, or http://HOST:PORT"):
        RolloutConfig(rollout="there")


# -- two processes -----------------------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2])
def test_a_worker_of_ray_gives_the_bits_of_this_process_and_so_does_a_killed_run(
    toy_model: Path, prompts: Path, tmp_path: Path, local_ray: None, lag: int
) -> None:
    train_grpo(grpo_settings(toy_model, prompts, tmp_path / "here", rollout_lag=lag))
    train_grpo(grpo_settings(toy_model, prompts, tmp_path / "ray", rollout="ray", rollout_lag=lag))
    assert_equal_runs(tmp_path / "here", tmp_path / "ray")
    config = grpo_settings(toy_model, prompts, tmp_path / "killed", rollout="ray", rollout_lag=lag)
    with pytest.raises(Killed):
        train_grpo(config, killed_in("step", 2))
    train_grpo(dataclasses.replace(config, resume=True))
    assert_equal_runs(tmp_path / "here", tmp_path / "killed")


@needs_ray
@pytest.mark.slow
def test_the_worker_is_another_process_and_its_death_is_told(
    toy_model: Path, prompts: Path, tmp_path: Path, local_ray: None
) -> None:
    import os

    from arriero.errors import TrainingError

    run = grpo.build(
        grpo_settings(toy_model, prompts, tmp_path / "run", rollout="ray"), notes(quiet=True), None, ByRule()
    )
    sampler: Any = run.prepared.rollouts.sampler
    assert sampler.memory["weights"] > 0
    run.prepared.rollouts(0)
    pid = sampler._ray.get(sampler._worker.__ray_call__.remote(lambda worker: os.getpid()))
    assert pid != os.getpid()
    sampler._ray.kill(sampler._worker)
    with pytest.raises(TrainingError, match=r"the rollout worker has died .* resume the run"):
        run.prepared.rollouts(1)
