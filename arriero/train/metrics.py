"""What a run measures as it goes: a file of JSON lines, a live line on the screen, and trackers on request.

metrics.jsonl has one line per logged step, with the keys below, and one per event ({"event": "validation", "step":
20, "loss": 1.3}). Counters are totals since step 0. It is appended to, a line at a time, so a kill costs at most the
line being written; on resume the lines after the checkpoint's step are cut off, and the record is that of a run
that was never stopped. A number that is not finite is written as null: NaN is not JSON.

    step             optimizer steps done
    loss             mean over the trained tokens of the global batch, nats
    lr, grad_norm    learning rate of the step; norm of the whole gradient before clipping
    tokens           through the model so far;  trained_tokens: those of them with a loss
    tokens_per_s     of this step
    seconds          in training steps so far (not validation, not saving)
    memory_bytes     peak so far, see `memory_bytes`
    skipped          steps passed over so far because loss or gradient was not finite, or a spike
    waited           seconds of this step spent waiting for its data
    mfu              model-FLOP use: the step's useful FLOPs at the measured matmul peak, as a share of its time
    NAME/loss ...    the same of another learner, where a run trains several; the plain keys are of the first
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from arriero.errors import require
from arriero.io.files import json_line, replaced_file
from arriero.show.terminal import notes

PROJECT = "arriero"  # at W&B and in trackio
SMOOTHING = 0.9  # weight of the past in the running mean of the loss
PACE_STEPS = 100  # what the time left is judged by
PLAIN_EVERY = 10.0  # seconds between lines where the output is not a terminal


class MetricsLog:
    """Appends to RUN/metrics.jsonl and feeds the trackers named ('tensorboard', 'wandb', 'trackio').

    `after` is the step that the run goes on from: 0 starts the file anew, more keeps the lines up to that step.
    """

    def __init__(self, run_dir: Path, trackers: Collection[str] = (), after: int = 0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._trackers = [_TRACKERS[name](run_dir, after) for name in trackers]
        self.path = run_dir / "metrics.jsonl"
        _cut(self.path, after)
        self._file = open(self.path, "ab")  # noqa: SIM115 - lives as long as the log

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Record one optimizer step; `metrics` holds "step" and whatever else was measured."""
        self._write(metrics)
        for tracker in self._trackers:
            tracker.log({f"train/{name}": value for name, value in metrics.items() if name != "step"}, metrics["step"])

    def event(self, event: str, step: int, **values: Any) -> None:
        """Record something that happened after `step`: "validation", "checkpoint", "resumed" ..."""
        self._write({"event": event, "step": step, **values})
        numbers = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            if numbers:
                tracker.log(numbers, step)

    def close(self) -> None:
        """Wait until the record is on the disk, and end the trackers' runs."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json_line(record))
        self._file.flush()  # to the system: a kill of this process loses nothing


def surviving_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines: none when it is missing, none from where a crash broke it."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:  # the last is empty, or half a line
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # broken UTF-8 is a ValueError, too
            return
        if not isinstance(record, dict):
            return
        yield line + b"\n", record


def _cut(path: Path, after: int) -> None:
    """Keep the lines of steps up to `after`, byte for byte; none when it is 0."""
    kept = [line for line, record in _records(path) if record["step"] <= after] if after else []
    with replaced_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def require_trackers(names: Collection[str]) -> None:
    """Raise a `UserError` where the package of a tracker is not installed."""
    for name in names:
        require(name, "track")


# -- trackers ----------------------------------------------------------------------------------------------------


class _Tracker(Protocol):
    def log(self, values: Mapping[str, Any], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run_dir: Path, after: int) -> None:
        require("tensorboard", "track")
        from torch.utils.tensorboard import SummaryWriter

        # the lines of a run that was killed after `after` are hidden
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after + 1 if after else None)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A run at W&B or in trackio, whose interface is W&B's, under an id kept in the run directory."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb(run_dir: Path, after: int) -> _Run:
    name = _run_id(run_dir, after)
    return _Run(require("wandb", "track").init(project=PROJECT, id=name, name=name, dir=str(run_dir), resume="allow"))


def _trackio(run_dir: Path, after: int) -> _Run:
    return _Run(require("trackio", "track").init(project=PROJECT, name=_run_id(run_dir, after), resume="allow"))


def _run_id(run_dir: Path, after: int) -> str:
    """A name of its own for each run, and the same one when it is resumed."""
    path = run_dir / "run_id"
    if not (after and path.exists()):
        path.write_text(f"{run_dir.resolve().name}-{secrets.token_hex(4)}", encoding="utf-8")
    return path.read_text(encoding="utf-8")


_TRACKERS: dict[str, Callable[[Path, int], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


# -- the screen --------------------------------------------------------------------------------------------------


class NoLog(MetricsLog):
    """Writes nothing: for processes other than process 0, which writes for all."""

    def __init__(self) -> None:
        """Opens nothing."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def event(self, event: str, step: int, **values: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LiveLine:
    """One line that keeps up with the run; where the output is no terminal, a plain line every ten seconds.

    The loss shown is a running mean (each step counts 0.9 of the next one), the time left is from the mean speed of the
    last 100 steps, but for the first step, which compiles.
    """

    def __init__(self, total: int, start: int = 0, console: Console | None = None) -> None:
        self._total, self._start = total, start
        self._console = console or notes()
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._loss = self._weight = 0.0  # sums of losses and ones, each step's 0.9 of that of the step after it
        self._began = self._printed = time.monotonic()
        self._ends: deque[float] = deque(maxlen=PACE_STEPS + 1)  # of the last steps

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a step's metrics: step, loss, lr, tokens_per_s, memory_bytes."""
        loss, now = metrics["loss"], time.monotonic()
        if math.isfinite(loss):
            self._loss, self._weight = SMOOTHING * self._loss + loss, SMOOTHING * self._weight + 1
        self._ends.append(now)
        text = self._text(metrics, now)
        if self._live:
            self._live.update(text)
        elif now - self._printed >= PLAIN_EVERY or metrics["step"] in (self._start + 1, self._total):
            self._console.print(text, soft_wrap=True)
            self._printed = now

    def validation(self, step: int, measured: Mapping[str, Any]) -> None:
        """Leave a line with what a validation found: its loss and, where it has one, bits per byte."""
        per_byte = measured.get("bits_per_byte")
        bits = "" if per_byte is None else f"  {per_byte:.4f} bits/byte"
        width = len(str(self._total))
        shown = "reward" if "reward" in measured else "loss"
        text = f"step {step:>{width}}/{self._total}  validation {shown} {measured[shown]:.4f}{bits}"
        self._console.print(text, soft_wrap=True, highlight=False)

    def _text(self, metrics: Mapping[str, Any], now: float) -> Text:
        step, total = metrics["step"], self._total
        counted = len(self._ends) - 1
        pace = (now - self._ends[0]) / counted if counted else now - self._began
        shown = f"{self._loss / self._weight:.4f}" if self._weight else "-"
        parts = [
            (f"step {step:>{len(str(total))}}/{total}", "bold"),
            (f"  loss {shown}", "bold cyan"),
            (f"  lr {metrics['lr']:.2e}", ""),
            (f"  {metrics['tokens_per_s']:,.0f} tokens/s", "green"),
            *([(f"  mfu {metrics['mfu']:.0%}", "green")] if "mfu" in metrics else []),
            (f"  {duration(pace * (total - step))} left", ""),
            (f"  {metrics['memory_bytes'] / 1e9:.2f} GB", "dim"),
        ]
        if metrics.get("skipped"):
            parts.append((f"  {metrics['skipped']} skipped", "red"))
        return Text.assemble(*parts)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42s, 7m05s, 3h20m.

    >>> [duration(s) for s in (41.6, 425, 12000)]
    ['42s', '7m05s', '3h20m']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def memory_bytes() -> int:
    """Return the peak memory so far: of the GPU's tensors where CUDA is in use, else of this process (resident)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # getrusage would count the parent's peak too, from before exec
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
