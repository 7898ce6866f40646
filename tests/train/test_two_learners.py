"""Two learners whose batches one of them makes: a run that is killed goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.actor_critic import make_trainer, rewards, run
from helpers.parallel import run_processes, started_by_torchrun
from helpers.training import assert_same, losses, toy_trainer

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.distributed.mesh import Mesh
from arriero.errors import CheckpointError
from arriero.train.metrics import surviving_records

STEPS = 20
COMMAND = ["-m", "helpers.actor_critic"]
GROUPS = ("weights", "optimizer", "average", "value-weights", "value-optimizer", "journal")


def wait_for_step(run_dir: Path, step: int, job: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while max(native.steps(run_dir), default=0) < step:
        assert job.poll() is None and time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.01)


def last(run_dir: Path) -> native.Saved:
    saved = Checkpoints(run_dir).latest()
    assert saved is not None and saved.step == STEPS
    return saved


def assert_ended_alike(one: Path, other: Path) -> None:
    """Every tensor of the last checkpoint, every counter and every record of a step or validation."""
    ours, theirs = last(one), last(other)
    for group in GROUPS:
        assert_same(ours.tensors(group), theirs.tensors(group))
    assert {**ours.state, "seconds": 0} == {**theirs.state, "seconds": 0}
    assert losses(one) == losses(other) and len(losses(one)) == STEPS
    for name in ("value/loss", "reward"):
        curves = [[r[name] for r in surviving_records(d / "metrics.jsonl") if name in r] for d in (one, other)]
        assert curves[0] == curves[1]


def test_a_killed_run_of_two_learners_goes_on_to_the_same_bits(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, *COMMAND, str(killed), str(STEPS)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for_step(killed, 6, first)  # after a validation and a save
        first.send_signal(signal.SIGKILL)
    assert max(native.steps(killed)) < STEPS
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200).stdout
    assert f"ended {STEPS} begun at " in output and "begun at 0" not in output
    run(make_trainer(whole, STEPS, Mesh.alone("cpu")), Mesh.alone("cpu"))
    assert_ended_alike(killed, whole)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_with_the_same_bits(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with started_by_torchrun([*COMMAND, str(killed), str(STEPS)], 2, restarts=1, output=tmp_path / "log") as job:
        wait_for_step(killed, 4, job)
        os.kill(int(next((killed / "pids").glob("1.*")).suffix[1:]), signal.SIGKILL)
        assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    assert len([*(killed / "pids").iterdir()]) == 4, (tmp_path / "log").read_text()
    run_processes([sys.executable, *COMMAND, str(whole), str(STEPS)], 2, 200)
    assert_ended_alike(killed, whole)
    names = {name.split("/")[0] for name in last(whole).tensors("journal")}
    assert names == {str(i) for i in range(12)}  # six of each process


def test_each_learner_steps_by_its_own_schedule_and_learns(tmp_path):
    trainer = make_trainer(tmp_path, STEPS, Mesh.alone("cpu"))
    before = {name: p.detach().clone() for name, p in trainer.learners["value"].parameters.items()}
    run(trainer, trainer.mesh)
    records = [r for r in surviving_records(tmp_path / "metrics.jsonl") if "event" not in r]
    assert records[-1]["value/loss"] < 0.5 * records[0]["value/loss"]
    policy, value = trainer.learners.values()
    assert (policy.counters.step, value.counters.step) == (2 * STEPS, STEPS)
    rates = [(r["lr"] / 1e-2, r["value/lr"] / 3e-3) for r in records]
    assert rates[9] != pytest.approx((rates[9][0], rates[9][0]), rel=0.01)
    assert any(not torch.equal(p, before[name]) for name, p in value.parameters.items())


def test_a_checkpoint_holds_the_first_learner_as_that_of_a_run_of_one(tmp_path):
    trainer = make_trainer(tmp_path, STEPS, Mesh.alone("cpu"))
    trainer.step()
    trainer.save()
    saved = native.at_step(tmp_path, 1)
    assert {path.name for path in saved.path.iterdir() if path.is_dir()} == {*GROUPS} - {"average"}
    assert_same(saved.tensors("weights"), trainer.learner.parameters)
    assert_same(saved.tensors("value-weights"), trainer.learners["value"].parameters)
    assert saved.state["step"] == 2 and saved.state["learners"]["value"]["step"] == 1 == saved.step

    alone = toy_trainer(tmp_path / "alone")
    alone.step()
    alone.save()
    saved = native.at_step(tmp_path / "alone", 1)
    assert {path.name for path in saved.path.iterdir() if path.is_dir()} == {"weights", "optimizer"}
    of_learner = {"step", "tokens", "trained_tokens", "skipped", "spikes", "usual", "averaged"}
    of_run = {"seconds", "best_loss", "best_step", "validation", "total_steps"}
    assert saved.state.keys() == of_learner | of_run


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    two, one = make_trainer(tmp_path / "two", 20, Mesh.alone("cpu")), toy_trainer(tmp_path / "one")
    for trainer in (two, one):
        trainer.step()
        trainer.save()
    with pytest.raises(CheckpointError, match="another recipe wrote it, which trained one model and value and kept a "):
        one.restore(two.checkpoints.latest())
    with pytest.raises(CheckpointError, match="another recipe wrote it, which trained one model; resume with the reci"):
        two.restore(one.checkpoints.latest())


def test_a_reward_is_the_share_of_tokens_that_follow():
    answers = torch.tensor([[9, 9, 9, 10, 11, 12, 13, 14], [0, 0, 30, 0, 1, 5, 5, 6], [0, 1, 2, 2, 2, 2, 2, 2]])
    assert rewards(answers.numpy()).tolist() == pytest.approx([1.0, 0.6, 0.0])
