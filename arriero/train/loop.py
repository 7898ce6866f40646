"""How a run proceeds: steps, validations, logs, signals, checkpoints, and which weights are its result.

Whatever trains (train/learner.py) and wherever batches come from, a run is the same: a *source* is told the number of a
step and gives what is learned from there, the learners step on it, and when it is due the run validates, logs and
saves. A source may be a pure function of the step (rows of a data set), or make its batches by the model that is being
trained; what such a source must still know after a kill is its *journal*, which each checkpoint holds. SIGTERM or
Ctrl-C ends a run after the step, with a checkpoint.

A recipe of one learner gives it, and a source of micro-batches. A recipe of several gives them by name, the first being
the one that the run is for, and an `update` that has each of them step:

    Trainer({"policy": policy, "value": value}, rollouts, ..., update=update, journal=rollouts)

Price: nothing beside the steps but one number that all processes agree on before each of them.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.distributed.peers import peers_of_this_run
from arriero.distributed.watch import Watch
from arriero.errors import CheckpointError, TrainingError
from arriero.show.terminal import notes
from arriero.train.config import LoopConfig
from arriero.train.learner import Learner
from arriero.train.metrics import LiveLine, MetricsLog, memory_bytes

log = logging.getLogger(__name__)

JOURNAL = "journal"  # the group of a checkpoint that holds a source's journal, and its key in state.json

Source = Callable[
    [int], Any
]  # step -> what is learned from there: this process's micro-batches, or what `update` takes
Update = Callable[[Any], Mapping[str, Any]]  # has the learners step on it; metrics, "loss" and "lr" among them
Validate = Callable[[], dict[str, Any]]  # "loss" in nats per token, and whatever else is worth recording


class Journal(Protocol):
    """What a source has to know when a run goes on, beside the number of the step."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors to save, on any device. Each process gives its own, under names that no other process gives."""

    def state(self) -> Mapping[str, Any]:
        """What else there is to save, as JSON holds it; process 0's is saved."""

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what was saved: the tensors of all processes, on the CPU, whatever their number is now."""


@dataclass
class Progress:
    """What a run has come to; saved with each checkpoint."""

    step: int = 0  # steps of the run done: of a recipe with one learner, optimizer steps
    seconds: float = 0.0  # in those steps
    best_loss: float | None = None  # lowest validation loss so far
    best_step: int | None = None
    validation: dict[int, float] = field(default_factory=dict)  # step -> validation loss


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    interrupted: the signal that stopped it, or None when all steps were done. result_loss: the validation loss of the
    weights that were written in the end; None where nothing was validated, or written.
    """

    progress: Progress
    interrupted: signal.Signals | None
    result_loss: float | None = None


class Trainer:
    """The learners of one run and where it stands; `run()` goes from the current step to the last."""

    def __init__(
        self,
        learners: Learner | Mapping[str, Learner],
        batches: Source,
        total_steps: int,
        loop: LoopConfig,
        run_dir: Path,
        validate: Validate | None = None,
        sidecars: Callable[[Path], None] | None = None,
        *,
        update: Update | None = None,
        journal: Journal | None = None,
    ) -> None:
        """learners: one, or several by name on one mesh, the first being the one that the run is for.

        Its checkpoint groups have no prefix; those of the others begin with "NAME-".
        sidecars(directory): writes the files beside the weights of a checkpoint, config.json and tokenizer.
        update: None where one learner steps once on what the source gives. journal: of the source, if it keeps one.
        """
        self.learners = {"model": learners} if isinstance(learners, Learner) else dict(learners)
        self.learner = next(iter(self.learners.values()))
        self.mesh = self.learner.engine.mesh
        for learner in self.learners.values():
            assert learner.engine.mesh is self.mesh, "the learners of a run share its mesh"
            learner.optim.check_batch(loop.batch_rows, loop.micro_rows, self.mesh.dp_size)
        assert update is not None or len(self.learners) == 1, "several learners need an `update` that has each step"
        self.batches, self.update, self.journal = batches, update or self.learner.step, journal
        self.total_steps, self.loop, self.run_dir, self.validate = total_steps, loop, run_dir, validate
        peers = peers_of_this_run(self.mesh.config.timeout)
        self.checkpoints = Checkpoints(run_dir, peers, self.mesh.stage_ranks, loop.keep_last, sidecars)
        self.progress = Progress()

    # -- the run -------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Do one step of the run and return its metrics. Raises `TrainingError` after too many that are not finite."""
        began, p = time.perf_counter(), self.progress
        tokens, at_peak = self.learner.counters.tokens, self._at_peak
        batches = self.batches(p.step)
        waited = time.perf_counter() - began
        metrics = self.update(batches)
        p.step += 1
        seconds = time.perf_counter() - began
        p.seconds += seconds
        self._stop_where_nothing_is_finite()
        record = {
            "step": p.step,
            **metrics,
            "tokens_per_s": (self.learner.counters.tokens - tokens) / seconds,
            "seconds": p.seconds,
            "memory_bytes": memory_bytes(),
            "waited": waited,
        }
        if any(learner.seconds_at_peak is not None for learner in self.learners.values()):
            record["mfu"] = (self._at_peak - at_peak) / seconds / self.mesh.world
        return record

    @property
    def _at_peak(self) -> float:
        return sum(learner.at_peak for learner in self.learners.values())

    @property
    def finite(self) -> bool:
        """Whether the last step of every learner was finite: if not, the weights may be broken."""
        return not any(learner.skipped_in_a_row for learner in self.learners.values())

    def _stop_where_nothing_is_finite(self) -> None:
        for name, learner in self.learners.items():
            if learner.skipped_in_a_row >= self.loop.max_skipped:
                saved = native.steps(self.run_dir)[-1:]
                before = "".join(
                    f"; the weights before: {native.path_of(self.run_dir, s) / native.WEIGHTS}" for s in saved
                )
                whose = f" of the {name}" if len(self.learners) > 1 else ""
                raise TrainingError(
                    f"step {self.progress.step}: loss or gradient{whose} was not finite for {learner.skipped_in_a_row} "
                    f"steps in a row (max_skipped); begin a new run with an lr below {learner.optim.lr}, or precision "
                    f"fp32{before}"
                )

    def run(self, record: MetricsLog) -> Outcome:
        """Train to the last step, or until SIGTERM or Ctrl-C: then finish the step, save, and return.

        While steps are not finite nothing is saved but after the last one of all: the weights may be broken, and good
        ones would be pruned for them. What is due waits for the next good step.
        """
        tenth = max(1, math.ceil(self.total_steps / 10))
        validate_every, save_every = self.loop.validate_every or tenth, self.loop.save_every or tenth
        p = self.progress
        saved_at = p.step
        console = notes(quiet=self.mesh.rank > 0)
        watch = Watch(self.checkpoints.peers)
        with watch, _signals() as stop, LiveLine(self.total_steps, p.step, console) as line:
            if p.step == 0:
                self._validate(record, line)
            while p.step < self.total_steps and not self.mesh.any(bool(stop) or self.checkpoints.failed):
                metrics = self.step()
                line.update(metrics)
                if p.step % self.loop.log_every == 0 or p.step == self.total_steps:
                    record.step(metrics)
                last = p.step == self.total_steps
                improved = (last or p.step % validate_every == 0) and self._validate(record, line)
                due = p.step // save_every > saved_at // save_every and self.finite
                if last or improved or due:
                    self.save()
                    saved_at = p.step
            if saved_at != p.step and self.finite:
                self.save()
            self.checkpoints.wait()
        if p.step == self.total_steps:
            return Outcome(p, None)  # whatever signal came during the last step: the others have not seen it
        return Outcome(p, stop[0] if stop else signal.SIGTERM)  # SIGTERM: that another process was sent

    def measure(self) -> dict[str, Any]:
        """What `validate` says of the weights as they are."""
        assert self.validate is not None
        with ExitStack() as stack:
            for learner in self.learners.values():
                stack.enter_context(learner.evaluating())
            return self.validate()

    def _validate(self, record: MetricsLog, line: LiveLine) -> bool:
        """Measure the validation loss; whether it is the lowest so far."""
        if self.validate is None:
            return False
        p, measured = self.progress, self.measure()
        loss = p.validation[p.step] = measured["loss"]
        record.event("validation", step=p.step, **measured)
        line.validation(p.step, measured)
        if not self.finite or not math.isfinite(loss) or (p.best_loss is not None and loss >= p.best_loss):
            return False  # weights that training steps are not finite with are never the best
        p.best_loss, p.best_step = loss, p.step
        return True

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def _prefixes(self) -> dict[str, str]:
        """What the checkpoint groups of each learner begin with, by its name."""
        return {name: "" if learner is self.learner else f"{name}-" for name, learner in self.learners.items()}

    def save(self) -> None:
        """Save learners, journal and progress; with many processes behind the steps that follow.

        The best checkpoint so far is never pruned. Raises `CheckpointError` when the save before this one has failed.
        """
        p, groups = self.progress, dict[str, Mapping[str, Tensor]]()
        for name, prefix in self._prefixes.items():
            groups |= self.learners[name].groups(prefix)
        of_run = {"seconds": p.seconds, "best_loss": p.best_loss, "best_step": p.best_step, "validation": p.validation}
        state = {**self.learner.state, **of_run, "total_steps": self.total_steps}
        if len(self.learners) > 1:
            state["learners"] = {name: x.state for name, x in self.learners.items() if x is not self.learner}
        if self.journal is not None:
            groups[JOURNAL], state[JOURNAL] = self.journal.tensors(), dict(self.journal.state())
        keep = set() if p.best_step is None else {p.best_step}
        self.checkpoints.save(p.step, groups, state, keep, own={JOURNAL})

    def restore(self, saved: native.Saved) -> None:
        """Take up learners, journal and progress where `saved` left them."""
        state = saved.state
        if state["total_steps"] != self.total_steps:
            raise CheckpointError(
                f"{saved.path}: it belongs to a run of {state['total_steps']} steps, this one has "
                f"{self.total_steps}; resume with the settings and data of config.toml in the run directory"
            )
        others = state.get("learners", {})
        if sorted(others) != sorted([*self.learners][1:]) or (JOURNAL in state) != (self.journal is not None):
            raise CheckpointError(
                f"{saved.path}: another recipe wrote it, which trained "
                f"{' and '.join(['one model', *sorted(others)])}{' and kept a journal' if JOURNAL in state else ''}; "
                "resume with the recipe of config.toml in the run directory"
            )
        for name, prefix in self._prefixes.items():
            self.learners[name].restore(saved, others.get(name, state), prefix)
        if self.journal is not None:
            self.journal.restore(saved.tensors(JOURNAL), state[JOURNAL])
        self.progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})
        self.progress.step = saved.step  # the state's is the first learner's
        measured = self.progress.validation.items()
        self.progress.validation = {int(step): math.nan if loss is None else loss for step, loss in measured}

    def load_result(self, record: MetricsLog) -> float | None:
        """Put what the run is for into the models: averaged weights, else those of the best validation loss.

        Returns their validation loss; None where there is none.
        """
        p = self.progress
        if any(learner.average for learner in self.learners.values()):
            for learner in self.learners.values():
                learner.load_average()
            if self.validate is None:
                return None
            measured = self.measure()
            record.event("averaged", step=p.step, **measured)
            loss: float = measured["loss"]
            return loss
        last = p.validation.get(p.step)
        if p.best_step is None or p.best_step in (0, p.step):  # 0: training never helped, and there is nothing to take
            return last
        try:
            saved = self.checkpoints.at_step(p.best_step)
        except CheckpointError as error:
            log.warning("%s; keeping the last step's weights instead", error)
            return last
        if saved is None:
            return last
        for name, prefix in self._prefixes.items():
            self.learners[name].load_weights(saved, prefix)
        return p.best_loss


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM into a list instead of dying; a second Ctrl-C interrupts at once.

    Outside the main thread signals go to whoever has that.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
