"""The share of a run's time that went into steps that count, through crashes, stops and restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from arriero.train import attempts


def write(run_dir: Path, *records: dict[str, object]) -> None:
    (run_dir / attempts.FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


def began(at: float, step: int = 0, job: str | None = None) -> dict[str, object]:
    return {"began": at, "step": step, "processes": 4, "job": job}


def test_crashes_cost_their_time_and_stops_do_not(tmp_path: Path) -> None:
    now = time.time()
    write(
        tmp_path,
        began(now - 1000),
        began(now - 900, 7),  # the one before crashed: its 100 seconds are counted
        {"ended": now - 700, "step": 13, "how": "SIGTERM"},
        began(now - 200, 13),  # 500 seconds of rest are not
        {"ended": now - 100, "step": 20, "how": "finished"},
    )
    spent = attempts.effective(tmp_path, 300.0)
    assert spent == attempts.Effective(share=pytest.approx(0.75), seconds=pytest.approx(400), starts=3, crashes=1)
    assert str(spent) == "6m40s in all, 75.0% of it in steps that count (3 starts, 1 crash)"


def test_half_a_line_of_a_crash_does_not_swallow_what_follows(tmp_path: Path) -> None:
    now = time.time()
    write(tmp_path, began(now - 100))
    with open(tmp_path / attempts.FILE, "a") as file:
        file.write('{"began": 17')
    attempts.begin(tmp_path, 7, 4, now - 50)
    assert attempts.effective(tmp_path, 50.0) == attempts.Effective(
        pytest.approx(0.5, abs=0.01), pytest.approx(100, abs=1), starts=2, crashes=1
    )


def test_what_goes_on_now_counts_up_to_now(tmp_path: Path) -> None:
    attempts.begin(tmp_path, 0, 2, time.time() - 50)
    assert attempts.effective(tmp_path, 25.0).share == pytest.approx(0.5, abs=0.01)
    assert "(1 start, no crash)" in str(attempts.effective(tmp_path, 25.0))
    attempts.end(tmp_path, 20, "finished")
    assert attempts.effective(tmp_path, 25.0).starts == 1


def test_a_run_is_taken_up_by_the_job_that_began_it_and_by_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not attempts.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert attempts.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4711")
    assert not attempts.restarted(tmp_path)
    attempts.begin(tmp_path, 0, 2, time.time())
    assert attempts.restarted(tmp_path)  # on a machine that took another's place, whose agent counts from 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4712")
    assert not attempts.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says where no id was given
    attempts.begin(tmp_path, 0, 2, time.time())
    assert not attempts.restarted(tmp_path)
