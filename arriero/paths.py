"""Where Arriero keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Arriero's cache: $ARRIERO_CACHE, else `arriero` in $XDG_CACHE_HOME, else ~/.cache/arriero."""
    if own := os.environ.get("ARRIERO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "arriero"
