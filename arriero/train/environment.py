"""Where a run took place: versions, commit, hardware, command. Written down with every run and every report."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from arriero.version import __version__

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "tiktoken", "sentencepiece")


def describe() -> dict[str, Any]:
    """Return versions, commit (None outside a checkout), hardware, time (UTC) and command line, as JSON holds them."""
    return {
        "versions": {
            "arriero": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "commit": commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with "+changes" when its files differ from it.

    None when the package is not under git's control: also when it is installed inside some other repository.
    """
    package = Path(__file__).parent.parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git(package, "rev-parse", "HEAD")
    return None if head is None else head + ("+changes" if _git(package, "status", "--porcelain", ".") else "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        ended = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):  # no git here, or a file system too slow to wait for
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
