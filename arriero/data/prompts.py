"""Prompts that a model answers while it learns: rows of a file as token ids, and which of them a step takes.

A row asks something (`prompt`, as text or messages; formats.py has the layouts) and may know more, such as the right
answer: all its other columns are kept, for whoever scores the answers. The ids are those of inference (`encode_chat`
with the generation prompt), so what a model is trained on is what it is asked later.

Which prompts a step takes is a pure function of (seed, step): the prompts in a random order, then again in another.
Held-out prompts differ from all training prompts by text: what is asked decides on which side a row is, and training
rows that ask what a held-out row asks are left out and counted.

Price: a tenth of a millisecond a row, and the rows in memory: prompt sets have thousands of rows, not billions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from arriero.data.formats import parse_prompt
from arriero.data.messages import text_of
from arriero.data.pack import random_order
from arriero.data.splits import parse_share
from arriero.errors import DataError
from arriero.io.records import read_records, source_files
from arriero.show.terminal import notes
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat


@dataclass(frozen=True)
class Prompt:
    """What is asked: its ids as the model is given them, its messages, and the row's other columns."""

    ids: tuple[int, ...]
    messages: list[dict[str, Any]]
    fields: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    row: int = 0  # from 1; for JSONL the line
    tools: list[dict[str, Any]] | None = None

    @property
    def where(self) -> str:
        """File and row, for error messages."""
        return f"row {self.row} of {self.file}"

    @property
    def text(self) -> str:
        """What a reader is shown: the user's text alone, or every message under its role."""
        if [message["role"] for message in self.messages] == ["user"]:
            return text_of(self.messages[0])
        return "\n\n".join(f"{message['role']}: {text_of(message)}" for message in self.messages)

    @property
    def digest(self) -> bytes:
        """SHA-256 of what is asked, white space and case apart: equal questions have equal ones."""
        return hashlib.sha256(" ".join(self.text.casefold().split()).encode()).digest()


class Prompts(Sequence[Prompt]):
    """The prompts of a file, in its order."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = list(prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        return Prompts(self._prompts[index]) if isinstance(index, slice) else self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def taken(self, seed: int, first: int, n: int) -> list[int]:
        """The indices at places `first` to `first + n - 1` of an endless sequence: every epoch has each prompt once.

        A pure function of its arguments and of how many prompts there are: a step that takes n prompts takes those from
        step x n on.
        """
        found: list[int] = []
        while len(found) < n:
            epoch, k = divmod(first + len(found), len(self))
            found += random_order(len(self), seed, epoch, 5)[k : k + n - len(found)].tolist()
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompt in self)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all ids and columns."""
        digest = hashlib.sha256()
        for prompt in self:
            digest.update(json.dumps([prompt.ids, prompt.fields], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def read_prompts(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_truncated: float = 0.05,
    raw: bool = False,
    console: Console | None = None,
) -> Prompts:
    """The prompts of `source`, a file, a directory of files, or a Hub data set id.

    max_length: tokens; longer prompts are left out, and are an error where they are more than the share
    `max_truncated`. raw: plain text for the model to continue, without the chat template.
    Raises DataError, naming file and row, for rows that ask nothing, or that the template refuses.
    """
    console = console or notes()
    found: list[Prompt] = []
    long: list[Prompt] = []
    for path in source_files(source):
        for record in read_records(path):
            messages, tools, fields = parse_prompt(record)
            where = f"row {record.row} of {record.file}"
            try:
                ids = _continued(tokenizer, messages) if raw else encode_chat(tokenizer, messages, tools)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            prompt = Prompt(tuple(ids), messages, fields, record.file, record.row, tools)
            (found if len(ids) <= max_length else long).append(prompt)
    if long and (len(long) > max_truncated * (len(long) + len(found)) or not found):
        share = len(long) / (len(long) + len(found))
        raise DataError(
            f"{long[0].where}: the prompt has {len(long[0].ids):,} tokens, and at most {max_length:,} fit before an "
            f"answer; so have {share:.1%} of the rows (at most {max_truncated:.1%} may be left out): shorten them, or "
            "raise max_prompt or max_truncated"
        )
    if long:
        console.print(f"left {len(long):,} prompts out: longer than {max_length:,} tokens", markup=False)
    return Prompts(found)


def read_split(
    train: str | Path,
    validation: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_truncated: float = 0.05,
    raw: bool = False,
    console: Console | None = None,
) -> tuple[Prompts, Prompts | None]:
    """Prompts to learn on, and those held out: a file, or a share of what is asked ("0": none).

    Training prompts that ask what a held-out prompt asks, white space and case apart, are left out, and said.
    """
    console = console or notes()

    def read(source: str | Path) -> Prompts:
        return read_prompts(
            source, tokenizer, max_length=max_length, max_truncated=max_truncated, raw=raw, console=console
        )

    prompts, share = read(train), parse_share(validation)
    if share == 0:
        return prompts, None
    if share is None:
        held_out = read(validation)
        seen = {prompt.digest for prompt in held_out}
    else:
        digests = sorted({prompt.digest for prompt in prompts})
        seen = {d for d in digests if int.from_bytes(d[:8], "big") < share * 2**64} or set(digests[:1])
        held_out = Prompts([prompt for prompt in prompts if prompt.digest in seen])
    kept = Prompts([prompt for prompt in prompts if prompt.digest not in seen])
    if not len(kept):
        raise DataError(f"{train}: every prompt is also held out ({validation}); give more prompts that differ by text")
    if share is None and len(kept) < len(prompts):
        console.print(
            f"left {len(prompts) - len(kept):,} of {len(prompts):,} training prompts out: {validation} asks the same",
            markup=False,
        )
    return kept, held_out


def _continued(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The ids of a plain text."""
    if [message["role"] for message in messages] != ["user"]:
        raise DataError("raw is on, and the prompt is a conversation; make it one text, or leave raw off")
    return [*tokenizer.begin_ids, *tokenizer.encode(text_of(messages[0]))]
