"""C++ for loops that torch has no fast operator for: compiled on first use by the system's compiler, and cached.

A C++ file, with the headers beside it, is one source with a plain C interface, called through ctypes, and always a
faster twin of Python or torch code: where it cannot be compiled, that runs instead, and a notice says so. The first use
costs some seconds. All that the binary depends on (sources, flags, compiler, CPU) is hashed into its name, so it
cannot be stale. No torch here.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from arriero.io.paths import cache_dir
from arriero.show.terminal import complain

log = logging.getLogger(__name__)

FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wno-psabi", "-shared", "-fPIC", "-pthread")


def load_cpp(source: Path, instead: str, *flags: str) -> ctypes.CDLL | None:
    """The compiled `source`, from Arriero's cache or made now; None, with a warning, when that fails.

    instead: what happens then, for the warning ("decoding through torch"). flags: for the compiler, besides `FLAGS`.
    """
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]
    )
    if not compiler:
        log.warning("no C++ compiler found: %s; install g++, or set CXX", instead)
        return None
    command = [*compiler, *FLAGS, *flags]
    sources = [source, *sorted(source.parent.glob("*.h"))]
    key = hashlib.sha256(repr(([s.read_bytes() for s in sources], command, _cpu())).encode()).hexdigest()[:20]
    library = cache_dir() / "kernels" / f"{source.stem}-{key}.so"
    try:
        if not library.is_file():
            _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        log.warning("%s could not be compiled, %s: %s", source.name, instead, detail)
        return None


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():  # people wait for it
        complain(f"compiling {source.name} for this machine, once: some seconds")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        out = Path(folder) / library.name
        subprocess.run([*command, str(source), "-o", str(out)], check=True, capture_output=True, text=True)
        os.replace(out, library)  # two processes that compile at once both succeed


def _cpu() -> str:
    """What -march=native depends on: a cache directory may be shared between machines."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.platform() + platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))}))
