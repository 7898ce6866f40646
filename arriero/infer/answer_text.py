"""The text of an answer as its tokens come: whole characters, cut before the first stop string that is complete.

What may be the beginning of a stop string is held back until it is known. Which stop string ends a text is decided by
its characters alone, wherever tokens end: the one that is complete first, and of several the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

from arriero.tokenizer.base import Tokenizer


class AnswerText:
    """Text of ids that arrive one at a time."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stops = stops
        self._held = ""
        self.stopped_by: str | None = None  # the stop string that was found

    def echo(self, ids: Sequence[int]) -> str:
        """The text of ids before the answer, in which no stop string is looked for."""
        return "".join(map(self._stream.push, ids))

    def push(self, token: int) -> str:
        """The characters that are certain now."""
        return self._cut(self._stream.push(token)) if self._stops else self._stream.push(token)

    def flush(self) -> str:
        """What is left at the end."""
        if self.stopped_by is not None:
            return ""
        rest = self._cut(self._stream.flush())
        held, self._held = self._held, ""
        return rest + held

    def _cut(self, piece: str) -> str:
        if not piece:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)
            self._held = ""
            return text[:at]
        longest = max(map(len, self._stops), default=1) - 1
        first = max(0, len(text) - longest)
        keep = next((i for i in range(first, len(text)) if any(s.startswith(text[i:]) for s in self._stops)), len(text))
        self._held = text[keep:]
        return text[:keep]
