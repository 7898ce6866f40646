"""Runs code that a model wrote where it can do no harm: the parent's side of `jail.py` and `runner.py`.

Price: about 0.1 s a job, most of it two starts of Python. Where the system gives no namespaces, `probe` raises:
there is no way to run such code in the open.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError, UserError

_HERE = Path(__file__).parent
_GRACE = 20.0  # seconds beyond its own deadline that a job may take on a machine that is busy elsewhere
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/alternatives")


@dataclass(frozen=True)
class Limits:
    """What one job may take, all its processes together where it says so."""

    seconds: float = 5.0
    """CPU seconds of a process; twice as many pass by the clock before everything is ended."""
    memory_mb: int = 512
    """Address space of a process, and memory of all processes together."""
    processes: int = 16
    """Processes and threads."""
    file_mb: int = 16
    """Size of a file, and of the temporary directory, which lies in memory."""
    output_kb: int = 1024
    """What a job may answer."""


@dataclass(frozen=True)
class Result:
    """How a job ended (done, timeout, memory, output, processes, signal N, exit code N), and the lines that it said."""

    end: str
    replies: list[dict[str, Any]]


class NoSandbox(UserError):
    """The system does not let code be locked up."""


def run(task: Mapping[str, Any], limits: Limits) -> Result:
    """Do a task of `runner.py` in a jail. Raises `NoSandbox` where there can be none."""
    if sys.platform != "linux":
        raise NoSandbox(_refusal(f"namespaces are Linux's, and this is {sys.platform}"))
    with tempfile.TemporaryDirectory(prefix="arriero-jail-") as root:
        job = {
            "root": root, "paths": _visible(), "python": _python(), "runner": _runner(),
            "task": {**task, "paths": _packages()},
            "seconds": limits.seconds, "memory_mb": limits.memory_mb, "processes": limits.processes,
            "file_mb": limits.file_mb, "output_kb": limits.output_kb,
        }  # fmt: skip
        said = _said(json.dumps(job).encode(), 2 * limits.seconds + _GRACE)
    if said is None:
        return Result("timeout", [])
    try:
        result = json.loads(said)
    except ValueError:
        return Result("the jail died", [])
    if "refused" in result:
        raise NoSandbox(_refusal(result["refused"]))
    return Result(result["end"], list(_lines(result["said"])))


@cache
def probe() -> None:
    """Run one addition in a jail. Raises `NoSandbox`, or `ConfigError` where Python itself does not run in it."""
    result = run({"code": "", "steps": [{"eval": "1 + 1"}]}, Limits(seconds=30))
    if result.end != "done" or result.replies[-1:] != [{"value": ["int", "0x2"]}]:
        raise ConfigError(
            f"unit tests: {_python()} does not run inside the sandbox (it ended with {result.end!r}); take a Python "
            "that lies in a directory of its own, or in /usr"
        )


def _said(job: bytes, seconds: float) -> bytes | None:
    """What the jail's process says; None, and all its processes killed, where it takes longer."""
    child = subprocess.Popen(
        [_python(), "-I", "-S", "-B", str(_HERE / "jail.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, env={},
    )  # fmt: skip
    try:
        return child.communicate(job, timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _lines(said: str) -> Any:
    """The replies, as far as they are whole and objects: code under test may write there as well."""
    for line in said.splitlines():
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(reply, dict):
            return
        yield reply


@cache
def _python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _runner() -> str:
    return (_HERE / "runner.py").read_text()


@cache
def _packages() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib")))


@cache
def _visible() -> list[str]:
    """What the code may read: Python, its packages, the system's libraries."""
    own = [sys.base_prefix, sys.base_exec_prefix, str(Path(_python()).parent.parent), *_packages()]
    return [path for path in dict.fromkeys([*_SYSTEM, *own]) if path != "/" and not _below_usr(path)]


def _below_usr(path: str) -> bool:
    return path.startswith("/usr/")


def _refusal(reason: str) -> str:
    return (
        f"unit tests run code that a model wrote, and this system does not let it be locked up ({reason}); allow user "
        "namespaces (sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; in a "
        "container --security-opt seccomp=unconfined and systempaths=unconfined), run where they are, or take another "
        "reward. It is never run in the open"
    )
