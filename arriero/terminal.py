"""What is printed for a person: where tables go, and warnings that are said once."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("arriero")

NO_TERMINAL = 120  # columns of a file or pipe: room for what 80 would cut off


def output(markup: bool = True) -> Console:
    """Standard output, as wide as the terminal that it is. markup: whether square brackets mean styles, as in rich."""
    from rich.console import Console

    return Console(markup=markup, width=None if sys.stdout.isatty() else NO_TERMINAL)


@cache
def warn_once(message: str) -> None:
    """Log a warning through the logger "arriero", once in a process and, under torchrun, by process 0 alone.

    For what a user's file says that is used otherwise than stated, or not at all; the text names the file, both values
    and the rule.
    """
    if os.environ.get("RANK", "0") == "0":
        log.warning(message)
