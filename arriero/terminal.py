"""Where tables are printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

NO_TERMINAL = 120  # columns of a file or pipe: room for what 80 would cut off


def output(markup: bool = True) -> Console:
    """Standard output, as wide as the terminal that it is. markup: whether square brackets mean styles, as in rich."""
    from rich.console import Console

    return Console(markup=markup, width=None if sys.stdout.isatty() else NO_TERMINAL)
