"""Printing for people: tables, notes, text from other authors, and warnings that are printed once.

Text from other authors (an answer, a document, a file's name) is data. It is never parsed as rich's markup, so
`[/INST]` is six characters and a bracket; on a terminal its control characters, which could rewrite the screen, are
shown as escapes (`\\x1b`), and so are bidirectional control characters; what the output's encoding lacks is written as
an escape too. Code that prints uses `output`, `notes`, `say` or `complain`. Results that go to a pipe or a file (an
answer, decoded text) are left as they are.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from arriero.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TextColumn
    from rich.text import Text

log = logging.getLogger("arriero")

NO_TERMINAL = 120  # columns of a file or pipe: room for what 80 would cut off

_CONTROLS = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
_TURNS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # embeddings, overrides and isolates of writing direction
_ESCAPES = {c: ascii(chr(c))[1:-1] for c in _CONTROLS | _TURNS}
_PLAINER = str.maketrans(
    {"█": "#", "▏": "|", "⟦": "[", "⟧": "]", "·": "."}
)  # what we draw with, elsewhere than in UTF-8
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # what Python makes of other bytes


def clean(text: str, encoding: str = "utf-8") -> str:
    """`text` with escapes for control characters (but for newlines and tabs) and for what `encoding` lacks."""
    text = text.replace("\r\n", "\n").translate(_ESCAPES)
    if not encoding.lower().replace("_", "-").startswith("utf"):
        text = text.translate(_PLAINER)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str = "", end: str = "\n") -> None:
    """Print to standard output: on a terminal clean, in a pipe or a file as it is."""
    stream = sys.stdout
    print(clean(text, stream.encoding or "utf-8") if stream.isatty() else text, end=end, flush=not end)


def complain(text: str) -> None:
    """Print to standard error, clean."""
    print(clean(text), file=sys.stderr)


def output() -> Console:
    """Standard output for tables, as wide as the terminal that it is."""
    return _console()(width=None if sys.stdout.isatty() else NO_TERMINAL)


def notes(quiet: bool = False) -> Console:
    """The console of standard error, for everything but results."""
    return _console()(stderr=True, quiet=quiet)


def label(form: str = "{task.description}") -> TextColumn:
    """A column of a progress bar for its description, which may hold a file's name."""
    from rich.progress import TextColumn

    return TextColumn(form, markup=False)


@cache
def _console() -> Any:
    """rich's console for text that others wrote; made here because rich is slow to import."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        """No markup, no emoji codes, and clean text."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(markup=False, emoji=False, **settings)

        def render_str(self, text: str, **settings: Any) -> Text:
            """What becomes of a string: cleaned before it is laid out."""
            return super().render_str(clean(text, self.encoding), **settings)

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            """What becomes of anything, at last."""
            for segment in super().render(renderable, options):
                if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                    yield segment
                else:
                    yield Segment(clean(segment.text, self.encoding), segment.style)

    return SafeConsole


def prepare_streams() -> None:
    """What the command line does first, so that no stream can end it with a traceback.

    A closed stream is one that gives and takes nothing. Output writes what its encoding lacks as escapes. Input is
    UTF-8, with or without a byte order mark; `check_input` refuses other bytes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something has been read already
            encoding = sys.stdin.encoding if sys.stdin.isatty() else "utf-8-sig"
            sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def check_input(text: str) -> str:
    """Text that was read from standard input; raises `UserError` where it is not UTF-8."""
    if wrong := _NOT_UTF8.search(text):
        line = text.count("\n", 0, wrong.start()) + 1
        byte = ord(wrong[0]) - 0xDC00
        raise UserError(
            f"standard input: not UTF-8 at line {line} (byte 0x{byte:02X}); convert it, for example with: "
            "iconv -f latin1 -t utf-8"
        )
    return text


@cache
def warn_once(message: str) -> None:
    """Log a warning through the logger "arriero", once in a process and, under torchrun, by process 0 alone.

    For contents of a user's file that are not used as stated, or not at all; the text names the file, both values and
    the rule.
    """
    if os.environ.get("RANK", "0") == "0":
        log.warning(clean(message))
