"""RUN/attempts.jsonl: when a run was started and restarted, and how each attempt ended.

One line when an attempt begins ({"began": seconds since 1970, "step", "processes", "job"}) and one when it ends by
itself ({"ended", "step", "how"}); an attempt that crashed has no second line. From it comes the effective training
time that Llama 3 reports (arXiv 2407.21783, section 3.3.4): seconds in steps that count, as a share of the time that
the run took with its starts, validations, saves, crashes, and the steps that crashes lost. The time between an attempt
that ended by itself and the next one is not counted.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.io.files import write_jsonl
from arriero.train.metrics import duration, surviving_records

FILE = "attempts.jsonl"


@dataclass(frozen=True)
class Effective:
    """How a run's time was spent."""

    share: float  # of the time in steps that count
    seconds: float  # in all
    starts: int
    crashes: int

    def __str__(self) -> str:
        crashes = "no crash" if not self.crashes else f"{self.crashes} crash" + "es" * (self.crashes > 1)
        starts = f"{self.starts} start" + "s" * (self.starts > 1)
        return f"{duration(self.seconds)} in all, {self.share:.1%} of it in steps that count ({starts}, {crashes})"


def job() -> str | None:
    """What tells the job that torchrun started from others (--rdzv-id); None where there is no such name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def restarted(run_dir: Path) -> bool:
    """Whether torchrun has started this job before, so that a run that is there already is this job's own."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return True
    jobs = [record["job"] for record in surviving_records(run_dir / FILE) if "began" in record]
    return job() is not None and jobs[-1:] == [job()]


def begin(run_dir: Path, step: int, processes: int, began: float) -> None:
    """Note that an attempt began at `began` (seconds since 1970) and goes on from `step`."""
    _append(run_dir, {"began": began, "step": step, "processes": processes, "job": job()})


def end(run_dir: Path, step: int, how: str) -> None:
    """Note that it ended by itself: "finished", or the name of a signal."""
    _append(run_dir, {"ended": time.time(), "step": step, "how": how})


def effective(run_dir: Path, seconds: float) -> Effective:
    """What became of the run's time up to now; `seconds` were spent in steps that count."""
    records = surviving_records(run_dir / FILE)
    total, crashes, now = 0.0, 0, time.time()
    for record, after in zip(records, [*records[1:], {"ended": now}], strict=True):
        if "began" in record:
            total += after.get("ended", after.get("began", now)) - record["began"]
            crashes += "began" in after
    return Effective(seconds / total if total else 0.0, total, sum("began" in r for r in records), crashes)


def _append(run_dir: Path, record: dict[str, Any]) -> None:
    write_jsonl(run_dir / FILE, [*surviving_records(run_dir / FILE), record])  # without half a line
