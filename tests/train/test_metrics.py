"""The metrics record, the live line and the trackers."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arriero.errors import UserError
from arriero.train.metrics import LiveLine, MetricsLog, duration, surviving_records


def metrics(step: int, loss: float = 1.5) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "lr": 2e-4,
        "grad_norm": 0.7,
        "tokens": 1301 * step,
        "trained_tokens": 17 * step,
        "tokens_per_s": 1234.5,
        "seconds": 3.1 * step,
        "memory_bytes": 1_710_000_000,
        "skipped": 0,
    }


def write(run_dir: Path, first: int, last: int) -> None:
    with MetricsLog(run_dir, after=first - 1) as log:
        for step in range(first, last + 1):
            log.step(metrics(step))
            if step % 5 == 0:
                log.event("validation", step=step, loss=1 / step)


# -- the record --------------------------------------------------------------------------------------------------


def test_each_step_and_event_is_a_line_of_json(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*(metrics(step) for step in range(1, 6)), {"event": "validation", "step": 5, "loss": 0.2}]
    assert surviving_records(tmp_path / "metrics.jsonl") == lines


def test_a_resumed_record_is_that_of_a_run_never_stopped(tmp_path: Path) -> None:
    write(tmp_path / "whole", 1, 20)
    write(tmp_path / "resumed", 1, 13)
    write(tmp_path / "resumed", 11, 20)  # the checkpoint was of step 10
    whole, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [record["step"] for record in surviving_records(path)] == [1, 2]
    write(tmp_path, 3, 4)
    assert [record["step"] for record in surviving_records(path)] == [1, 2, 3, 4]


def test_a_new_run_starts_the_record_anew(tmp_path: Path) -> None:
    write(tmp_path, 1, 3)
    write(tmp_path, 1, 2)
    assert [record["step"] for record in surviving_records(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_killed_process_has_left_every_line_that_it_logged(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from arriero.train.metrics import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}))
for step in range(1, 8):
    log.step({{"step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [record["step"] for record in surviving_records(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.step({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


# -- trackers ----------------------------------------------------------------------------------------------------


def test_a_missing_tracker_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does to block an import
    with pytest.raises(UserError, match=r"needs the package 'wandb'.*pip install 'arriero\[track\]'"):
        MetricsLog(tmp_path, ("wandb",))


TRACK = """
import sys
from pathlib import Path
from arriero.train.metrics import MetricsLog
tracker, run_dir, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with MetricsLog(run_dir, (tracker,), after=first - 1) as log:
    for step in range(first, last + 1):
        log.step({"step": step, "loss": 1 / step})
    log.event("validation", step=last, loss=0.25)
"""


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_gets_a_run_and_its_continuation(tmp_path: Path, tracker: str) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed (extra 'track')")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for first, last in ((1, 5), (4, 7)):  # killed after 5, resumed from 3
        command = [sys.executable, "-c", TRACK, tracker, str(tmp_path / "run"), str(first), str(last)]
        subprocess.run(command, check=True, env=os.environ | offline, capture_output=True, timeout=120)
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run/tensorboard"))
        events.Reload()
        losses = {event.step: event.value for event in events.Scalars("train/loss")}
        assert losses == pytest.approx({step: 1 / step for step in range(1, 8)})
        assert [event.step for event in events.Scalars("validation/loss")] == [7]
    elif tracker == "wandb":
        name = (tmp_path / "run/run_id").read_text()
        files = list((tmp_path / "run/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
        assert len(files) == 2
        assert all(b"train/loss" in file.read_bytes() for file in files)
    else:
        import sqlite3

        (database,) = (tmp_path / "trackio").glob("arriero*.db")
        rows = sqlite3.connect(database).execute("select step, run_name from metrics").fetchall()
        assert {step for step, _ in rows} == set(range(1, 8))
        assert {name for _, name in rows} == {(tmp_path / "run/run_id").read_text()}


# -- the screen --------------------------------------------------------------------------------------------------


def shown(terminal: bool, steps: int) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, color_system=None)
    with LiveLine(steps, console=console) as line:
        for step in range(1, steps + 1):
            line.update(metrics(step, loss=float("nan") if step == 2 else 2.0 / step))
    return screen.getvalue()


def test_without_a_terminal_there_is_a_plain_line_for_the_first_step_and_the_last() -> None:
    lines = shown(terminal=False, steps=11).splitlines()
    assert lines[0].startswith("step  1/11  loss 2.0000  lr 2.00e-04  1,234 tokens/s  ")
    assert lines[0].endswith("left  1.71 GB")
    assert [line[:10] for line in lines] == ["step  1/11", "step 11/11"]


def test_on_a_terminal_the_line_shows_the_smoothed_loss_of_the_last_step() -> None:
    text = shown(terminal=True, steps=3)
    loss = (0.9 * 2.0 + 2.0 / 3) / 1.9  # the step whose loss was not finite does not count
    assert f"step 3/3  loss {loss:.4f}" in text
    assert "0s left" in text


@pytest.mark.parametrize(
    ("measured", "said"), [({"loss": 3.5}, ""), ({"loss": 3.5, "bits_per_byte": 1.25}, "  1.2500 bits/byte")]
)
def test_a_validation_leaves_a_line(measured: dict[str, float], said: str) -> None:
    screen = io.StringIO()
    LiveLine(10, console=Console(file=screen)).validation(5, measured)
    assert screen.getvalue() == f"step  5/10  validation loss 3.5000{said}\n"


def test_the_time_left_forgets_the_step_that_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 60.0, 75.0, 90.0])  # the start, and the ends of three steps
    monkeypatch.setattr("arriero.train.metrics.time.monotonic", lambda: next(clock))
    screen = io.StringIO()
    line = LiveLine(102, console=Console(file=screen, width=120))
    for step in (1, 2, 3):
        line.update(metrics(step))
    left = [re.search(r"(\S+) left", text) for text in screen.getvalue().splitlines()]
    assert [found[1] for found in left if found] == ["1h41m", "25m00s", "24m45s"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (12000, "3h20m")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


PEAK = """
import psutil
from arriero.train.metrics import memory_bytes
before = memory_bytes()
block = b"x" * (before - psutil.Process().memory_info().rss + 97_000_000)
del block
print(memory_bytes() - before)
"""


def test_peak_memory_counts_what_was_freed_again() -> None:
    grown = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True).stdout
    assert 90_000_000 < int(grown) < 110_000_000
