"""Readers against mutated files: each try succeeds or is refused, quickly and in little memory; all else is a finding.

A `Subject` is a reader: `make` writes valid files, `read` reads them and uses what came out. Try n of a subject changes
one of its files as seed n says (`mutate.py`) and reads. Warm worker processes do that, forked from a server that has
imported everything; each try's memory is the peak that the kernel saw (Linux) above what the process held before, and
2 GB of addresses are the most it gets. A watchdog kills a worker whose try takes too long, and says where it was.

What is neither success nor `UserError` is a finding: it keeps the seed and the files, and
    PYTHONPATH=tests python -m hostile --replay SUBJECT SEED
does it again.

Price: two seconds to start, then about ten milliseconds a try.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

import psutil

from arriero.errors import UserError
from helpers.mutate import mutated

LIMIT_S = 5.0  # processor time of one try; ten times as much by the clock
MEMORY = 256 << 20  # bytes over what the worker held before
ADDRESSES = 2 << 30  # bytes of address space over an idle worker: what is beyond raises MemoryError
CHUNK = 25  # tries that a worker is given at a time
SPENT = 64 << 20  # bytes that tries may leave behind in a worker before it is replaced


@dataclass(frozen=True)
class Subject:
    """A reader. `files`: patterns of those that are mutated.

    sealed: a manifest or checksum covers the files, so that what `read` returns must be what it returns for the valid
    ones, or be refused.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    files: tuple[str, ...] = ("**/*",)
    sealed: bool = False


@dataclass(frozen=True)
class Finding:
    """A try that neither succeeded nor was refused. kind: traceback, memory, hang, death or silence."""

    subject: str
    seed: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        """What findings of one cause have in common."""
        return f"{self.subject}: {self.kind}: {self.text.strip().splitlines()[-1] if self.text else ''}"


@dataclass
class Outcome:
    """How many tries succeeded and were refused, and the findings."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        """A line of counts, then one for each cause of findings, the most frequent first."""
        tries = sum(self.counts.values())
        lines = [
            f"{tries} tries in {self.seconds:.0f} s: " + ", ".join(f"{n} {k}" for k, n in self.counts.most_common())
        ]
        causes = Counter(finding.place for finding in self.findings)
        first = {finding.place: finding.seed for finding in reversed(self.findings)}
        return "\n".join(
            [*lines, *(f"{n:5} x {cause[:300]} (seed {first[cause]})" for cause, n in causes.most_common())]
        )


def write_valid(subjects: Sequence[Subject], root: Path) -> None:
    """Write the valid files of each subject into a directory of its name."""
    for subject in subjects:
        (root / subject.name).mkdir(parents=True)
        subject.make(root / subject.name)


def write_try(subject: Subject, valid: Path, seed: int, target: Path) -> Path:
    """Lay the files of one try into `target`: links to the valid ones, and a mutated one, whose path comes back."""
    rng = Random(f"{subject.name} {seed}")
    names = sorted(
        {p.relative_to(valid).as_posix() for pattern in subject.files for p in valid.glob(pattern) if p.is_file()}
    )
    chosen = rng.choice(names)
    for path in valid.rglob("*"):
        inner = target / path.relative_to(valid)
        if path.is_dir():
            inner.mkdir(parents=True, exist_ok=True)
        elif path != valid / chosen:
            inner.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, inner)
    file = target / chosen
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(mutated(file.name, (valid / chosen).read_bytes(), rng))
    return file


# -- the worker --------------------------------------------------------------------------------------------------


def _work(subjects: Sequence[Subject], valid: Path, scratch: Path, log: Path, limit_s: float, jobs: Connection) -> None:
    """Do what `jobs` asks for: (place in `subjects`, seeds); send (kind, text) for each seed."""
    trace = open(log, "a")  # noqa: SIM115 (as long as the process)
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace)
    os.dup2(trace.fileno(), 1)  # what libraries print
    os.dup2(trace.fileno(), 2)
    logging.disable(logging.CRITICAL)
    expected = {}
    for subject in subjects:  # warm: what a reader loads once is no part of a try
        expected[subject.name] = subject.read(valid / subject.name)
    addresses = _status("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    jobs.send("ready")
    while (job := jobs.recv()) is not None:
        subject = subjects[job[0]]
        for seed in job[1]:
            folder = scratch / f"{os.getpid()}-{seed}"
            write_try(subject, valid / subject.name, seed, folder)
            trace.truncate(0)
            jobs.send(_attempt(subject, folder, expected[subject.name]))
            shutil.rmtree(folder)
        jobs.send(("leftover", _status("VmRSS")))


def _attempt(subject: Subject, folder: Path, expected: object) -> tuple[str, str]:
    held = _reset_peak()
    kind, text = "success", ""
    try:
        found = subject.read(folder)
        if subject.sealed and found != expected:
            kind, text = "silence", "read without a word, though it is not what the manifest covers"
    except UserError as error:
        kind, text = ("refusal", "") if str(error).strip() else ("traceback", f"{type(error).__name__} without a text")
    except BaseException as error:  # a Rust library's panic is no Exception
        kind, text = "traceback", _described(error)
    grown = _status("VmHWM") - held
    if kind != "traceback" and grown > MEMORY:
        kind, text = "memory", f"{grown / 2**20:.0f} MB more than before"
    return kind, text


def _described(error: BaseException) -> str:
    """The traceback, and as its last line what is common to errors of one cause: type and innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}arriero{os.sep}" in frame.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else ""
    text = "".join(traceback.format_exception(error))[-4000:]
    return f"{text}\n{type(error).__name__} at {place}"


def _status(key: str) -> int:
    """A size of this process in bytes, as the kernel tells it; 0 where it does not."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(key + ":")), 0)
    except OSError:
        return 0


def _reset_peak() -> int:
    """Make the peak of memory what is held now, and return that."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return _status("VmHWM")


# -- the watchdog ------------------------------------------------------------------------------------------------


class _Worker:
    """A process that tries, and what it has to do; replaced when it dies, hangs or grows."""

    def __init__(self, subjects: Sequence[Subject], valid: Path, scratch: Path, limit_s: float) -> None:
        self.arguments = (subjects, valid, scratch)
        self.log, self.limit_s = scratch / f"log-{id(self)}", limit_s
        self.queue: list[int] = []  # seeds that are not reported yet
        self.used: float | None = None  # processor seconds when the try in progress had taken a quarter of its time
        self.subject = 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.jobs, theirs = context.Pipe()
        arguments = (*self.arguments, self.log, self.limit_s, theirs)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        if not self.jobs.poll(120):
            raise RuntimeError("a worker of the mutation test does not start")
        try:
            assert self.jobs.recv() == "ready"
        except EOFError:
            raise RuntimeError(f"a worker cannot read the valid files: {self.log.read_text()}") from None
        self.idle = 0
        self.since = time.monotonic()

    def give(self, subject: int, seeds: Sequence[int]) -> None:
        self.subject, self.queue, self.since = subject, list(seeds), time.monotonic()
        self.jobs.send((subject, self.queue))

    def hangs(self) -> bool:
        """Whether a try takes too long: by its own processor time, since other work may keep it from running."""
        silent = time.monotonic() - self.since
        if silent < self.limit_s / 4:
            self.used = None
            return False
        times = psutil.Process(self.process.pid).cpu_times()
        now = times.user + times.system
        self.used = now if self.used is None else self.used
        return now - self.used > self.limit_s * 3 / 4 or silent > self.limit_s * 10

    def replace(self) -> str:
        """End the process, start another for the rest of the queue but its first; return what the old one left."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)  # where is it?
            time.sleep(0.1)
            self.process.kill()
        self.process.join()
        said = self.log.read_text(errors="replace")
        self.start()
        if rest := self.queue[1:]:
            self.give(self.subject, rest)
        else:
            self.queue = []
        return said


def hunt(
    subjects: Sequence[Subject],
    tries: int,
    valid: Path,
    *,
    first_seed: int = 0,
    workers: int = 1,
    limit_s: float = LIMIT_S,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Try each subject `tries` times; `valid` is what `write_valid` wrote. Limits see the module."""
    outcome, began = Outcome(), time.monotonic()
    todo = _chunks(len(subjects), tries, first_seed)
    _serve()
    with tempfile.TemporaryDirectory(dir=valid.parent) as scratch:  # tries link to what lies in `valid`
        crew = [_Worker(subjects, valid, Path(scratch), limit_s) for _ in range(workers)]
        busy = [worker for worker in crew if _next(worker, todo)]
        while busy:
            wait([worker.jobs for worker in busy], timeout=0.2)
            for worker in list(busy):
                for finding in _heard(worker, subjects, outcome):
                    outcome.findings.append(finding)
                if not worker.queue and not _next(worker, todo):
                    busy.remove(worker)
            outcome.seconds = time.monotonic() - began
            progress(outcome)
        for worker in crew:
            worker.process.kill()
            worker.process.join()
    return outcome


def _chunks(n_subjects: int, tries: int, first: int) -> Iterator[tuple[int, range]]:
    """Every subject in turn, so that a run that is ended early has seen them all."""
    for start in range(first, first + tries, CHUNK):
        for subject in range(n_subjects):
            yield subject, range(start, min(start + CHUNK, first + tries))


def _next(worker: _Worker, todo: Iterator[tuple[int, range]]) -> bool:
    job = next(todo, None)
    if job is not None:
        worker.give(job[0], job[1])
    return job is not None


def _heard(worker: _Worker, subjects: Sequence[Subject], outcome: Outcome) -> Iterator[Finding]:
    """Take what a worker has said; see to one that is dead or silent."""
    name = subjects[worker.subject].name

    def finding(kind: str, text: str) -> Finding:
        return Finding(name, worker.queue[0], kind, text)

    while worker.queue:
        try:
            said = worker.jobs.recv() if worker.jobs.poll() else None
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode
            outcome.counts["death"] += 1
            found, said = finding("death", ""), worker.replace()
            if code == 1:
                raise RuntimeError(f"the mutation test itself failed at {found}: {said}") from None
            yield Finding(name, found.seed, "death", f"{said}\nexit code {code}")
            continue
        if said is None:
            if worker.hangs():
                outcome.counts["hang"] += 1
                found = finding("hang", "")
                yield Finding(name, found.seed, "hang", _where(worker.replace()))
            return
        worker.since = time.monotonic()
        kind, text = said
        outcome.counts[kind] += 1
        if kind not in ("success", "refusal"):
            yield finding(kind, text)
        worker.queue.pop(0)
    if worker.jobs.poll(worker.limit_s):
        _, held = worker.jobs.recv()
        worker.idle = worker.idle or held
        if held > worker.idle + SPENT:
            worker.replace()


def _where(trace: str) -> str:
    """What faulthandler wrote about a hang, and as the last line the innermost place of ours."""
    ours = [line.strip() for line in trace.splitlines() if f"{os.sep}arriero{os.sep}" in line]
    return f"{trace}\n{ours[0] if ours else 'no trace'}"


def _serve() -> None:
    """Start the server that workers are forked from, with everything imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(sys.path))
    multiprocessing.set_forkserver_preload(["helpers.hostile", "helpers.subjects"])


def save(finding: Finding, subjects: Sequence[Subject], valid: Path, out: Path) -> Path:
    """Keep the files of a finding, and what was found, in a directory of their own; returns it."""
    subject = next(s for s in subjects if s.name == finding.subject)
    folder = out / f"{re.sub(r'[^a-z0-9.]+', '-', finding.subject.lower())}-{finding.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=valid.parent) as scratch:
        file = write_try(subject, valid / subject.name, finding.seed, Path(scratch) / "try")
        text = f"{finding.kind}, {file.relative_to(scratch)} was changed\n{finding.text}\n"
        shutil.copytree(Path(scratch) / "try", folder / "files")
    (folder / "finding.txt").write_text(text, errors="backslashreplace")
    return folder
