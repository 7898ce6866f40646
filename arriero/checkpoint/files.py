"""Writes directories so that a reader never sees an incomplete one; for single files and JSON see arriero/io/files.py.

A crash leaves either the old content or the new, and at worst a stray file whose name begins with a dot.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arriero.io.files import sync


@contextmanager
def replaced_directory(path: Path, replaces: str | None = None) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success fsync its files and put them at `path`.

    When `path` does not exist, one rename does it. Otherwise the files are moved in one by one, config.json last;
    of the files that were there, those that match the pattern `replaces` (weights of the model before) are removed,
    and others left alone.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: (file.name == "config.json", file.name))
        for file in files:
            sync(file)
        sync(temporary)
        if path.exists():
            for file in files:
                os.replace(file, path / file.name)
            old = path.glob(replaces) if replaces else ()
            for stale in {file.name for file in old} - {file.name for file in files}:
                (path / stale).unlink()
            sync(path)
        else:
            os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
