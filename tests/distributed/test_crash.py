"""Under torchrun, processes are killed, stopped and told to end: the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.parallel import started_by_torchrun
from helpers.runs import Run, do_together
from helpers.training import assert_same, losses
from safetensors.torch import load_file

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints


@contextmanager
def torchrun(run: Run, world: int, restarts: int) -> Iterator[subprocess.Popen[str]]:
    """The run as a job of `world` processes; nothing of it is left when the block ends."""
    run_dir = Path(run.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    plan = run_dir / "plan.json"
    plan.write_text(json.dumps([asdict(run)]))
    with started_by_torchrun(["-m", "helpers.runs", str(plan)], world, restarts, run_dir / "output.txt") as job:
        try:
            yield job
        finally:
            for _, pid in processes(run):  # a torchrun that was killed has left them
                if Path(f"/proc/{pid}").exists() and str(plan) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)


def processes(run: Run) -> list[tuple[int, int]]:
    """(rank, process id) of all that were ever started, in order."""
    files = sorted((Path(run.run_dir) / "pids").glob("*.*"), key=lambda file: file.stat().st_mtime_ns)
    return [(int(file.stem), int(file.suffix[1:])) for file in files]


def wait_for(run: Run, n: int, job: subprocess.Popen[str], seconds: float = 120) -> list[tuple[int, int]]:
    """Wait until n processes were started in all."""
    deadline = time.monotonic() + seconds
    while len(started := processes(run)) < n:
        assert job.poll() is None and time.monotonic() < deadline, output(run)
        time.sleep(0.01)
    return started


def wait_for_checkpoint(run: Run, job: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until there is one to go on from."""
    deadline = time.monotonic() + seconds
    while not native.steps(Path(run.run_dir)):
        assert job.poll() is None and time.monotonic() < deadline, output(run)
        time.sleep(0.01)


def output(run: Run) -> str:
    return (Path(run.run_dir) / "output.txt").read_text()


def assert_same_end(run: Run, undisturbed: Run) -> None:
    ours, theirs = Path(run.run_dir), Path(undisturbed.run_dir)
    assert_same(load_file(ours / "final.safetensors"), load_file(theirs / "final.safetensors"))
    assert losses(ours) == losses(theirs)


def kill_and_compare(run: Run, world: int, kills: int, longest: float, seed: int) -> int:
    """Kill `kills` times, each within `longest` seconds of a start; returns how many kills hit a save.

    None comes before the first checkpoint: there would be nothing to go on from, and a slow machine would test nothing.
    """
    chance, hits = random.Random(seed), 0
    undisturbed = replace(run, run_dir=run.run_dir + "-undisturbed", sleep=0.0)
    checkpoints = Path(run.run_dir) / "checkpoints"
    with torchrun(run, world, restarts=kills) as job:
        for n in range(1, kills + 1):
            started = wait_for(run, n * world, job)[-world:]
            wait_for_checkpoint(run, job)
            time.sleep(chance.uniform(0, longest))
            assert job.poll() is None, f"the run ended before kill {n}: {output(run)}"
            os.kill(chance.choice(started)[1], signal.SIGKILL)
            hits += bool(list(checkpoints.glob(".*")))
            if steps := native.steps(Path(run.run_dir)):
                assert native.at_step(Path(run.run_dir), steps[-1]) is not None
        Path(undisturbed.run_dir).mkdir()
        do_together([undisturbed], world, Path(undisturbed.run_dir) / "plan.json")
        assert job.wait(timeout=300) == 0, output(run)
    assert f"ended {run.steps} None" in output(run)
    assert not list(checkpoints.glob(".*"))
    assert_same_end(run, undisturbed)
    return hits


def test_a_run_whose_processes_are_killed_ends_by_itself_with_the_same_weights(tmp_path: Path) -> None:
    kill_and_compare(Run(str(tmp_path / "run"), steps=60, save_every=1, sleep=0.05), 2, kills=1, longest=1.5, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments_saves_included(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), steps=600, save_every=1, sleep=0.05)
    hits = kill_and_compare(run, 2, kills=50, longest=1.5, seed=5)
    print(f"{hits} of 50 kills left a save unfinished")
    assert hits > 0, "no kill hit a save: the test has shown nothing"


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_saves(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), steps=100_000, save_every=1)
    with torchrun(run, 2, restarts=0) as job:
        started = dict(wait_for(run, 2, job))
        wait_for_checkpoint(run, job)
        os.kill(started[1], signal.SIGTERM)
        assert job.wait(timeout=120) == 0, output(run)
    saved = Checkpoints(tmp_path / "run").latest()
    assert saved is not None
    assert f"ended {saved.step} SIGTERM" in output(run)
    assert len(losses(tmp_path / "run")) == saved.step


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_hangs_is_named_within_the_time_out_and_the_run_goes_on(tmp_path: Path, stopped: int) -> None:
    run = Run(str(tmp_path / "run"), steps=40, save_every=1, sleep=0.05, timeout=25)
    with torchrun(run, 2, restarts=1) as job:
        started = dict(wait_for(run, 2, job))
        wait_for_checkpoint(run, job)
        os.kill(started[stopped], signal.SIGSTOP)
        hung = time.monotonic()
        while "has not been heard of" not in output(run) and time.monotonic() < hung + 60:
            time.sleep(0.05)
        assert time.monotonic() - hung < 25 + 5, output(run)  # and what a crowded machine adds
        assert f"process {stopped} of 2 has not been heard of for" in output(run)
        wait_for(run, 4, job)
        assert job.wait(timeout=200) == 0, output(run)
    assert "ended 40 None" in output(run)
