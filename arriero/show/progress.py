"""Progress bars in one style: a description, the progress, a text from the work itself, and the time left.

A bar is shown on a terminal only, and removed when its work ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from arriero.show.terminal import label, notes

T = TypeVar("T")
Note = str | Callable[[], str]  # a function is asked anew each time that the bar is drawn


class Bar:
    """A progress bar, as the work updates it."""

    def __init__(self, shown: Progress, title: str, total: float | None) -> None:
        self._shown, self._task = shown, shown.add_task(title, total=total, note="")

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        self._shown.update(self._task, advance=amount)

    def reach(self, done: float) -> None:
        """So much is done in all."""
        self._shown.update(self._task, completed=done)

    def say(self, note: Note) -> None:
        """Set the text after the bar."""
        self._shown.update(self._task, note=note)

    @property
    def elapsed(self) -> float:
        """Seconds since the bar began, above 0."""
        return self._shown.tasks[self._task].elapsed or 1e-9


@contextmanager
def progress(title: str, total: float | None = None, console: Console | None = None) -> Iterator[Bar]:
    """A bar while the block runs; a spinner where the `total` is unknown."""
    console = console or notes()
    columns: list[ProgressColumn] = [label(), _NoteColumn(), TimeElapsedColumn()]
    if total is None:
        columns.insert(0, SpinnerColumn())
    else:
        columns[1:1] = [BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
        columns.append(TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=4
    ) as shown:
        yield Bar(shown, title, total)


def each(items: Iterable[T], title: str, total: float | None = None, console: Console | None = None) -> Iterator[T]:
    """The items, with a bar that counts them; `total` is their number, where they do not know it themselves."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(title, total, console) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def counting(title: str) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the bytes that were read, and shows their sum and rate."""
    n_bytes = 0

    def count(more: int) -> None:
        nonlocal n_bytes
        n_bytes += more
        bar.say(f"{n_bytes / 1e6:,.1f} MB, {n_bytes / 1e6 / bar.elapsed:,.1f} MB/s")

    with progress(title) as bar:
        yield count


class _NoteColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        note = task.fields["note"]
        return Text(note() if callable(note) else note)
