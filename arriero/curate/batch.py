"""A batch of documents on its way through the steps, and what a step says of it.

A step is a frozen dataclass of settings with a class attribute `name` and one of

    judge(analysis) -> [reason or None]                        a rule: keep or drop
    edit(analysis) -> [(new text, reason or None)]             a rule that may change the text
    run(batch) -> [(document, reason or None)]                 anything else that a document decides alone
    a corpus step (steps/corpus.py)                            what only the whole corpus can decide, such as duplicates

A reason is a few words; what differs from document to document follows a colon or is the first number, so that
`category` can count them: "dup_line_frac 0.41 > 0.3" is one of many "dup_line_frac … > 0.3".
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.curate.analysis import Analysis, analyse
from arriero.curate.document import Document

Result = list[tuple[Document, str | None]]
"""For each document of a batch the document as it goes on, and None or why it does not."""


@dataclass(frozen=True)
class Batch:
    """Documents of one part, in its order: all of them prose, or all source code."""

    documents: Sequence[Document]
    is_code: bool = False

    @functools.cached_property
    def analysis(self) -> Analysis:
        """Words, lines and paragraphs, found once for all rules until a step changes a text."""
        return analyse([document.text for document in self.documents])

    def only(self, alive: Sequence[int]) -> Batch:
        """The batch of these of its documents; itself where they are all."""
        same = len(alive) == len(self.documents)
        return self if same else Batch([self.documents[i] for i in alive], self.is_code)

    def after(self, result: Result, alive: Sequence[int]) -> tuple[Batch, list[int]]:
        """The batch after a step with these verdicts on the documents `alive`, and which of those are kept.

        As long as no text changes, dropped documents stay in the batch, so that its analysis remains valid.
        """
        left = [i for i, (_, reason) in zip(alive, result, strict=True) if reason is None]
        documents = list(self.documents)
        for i, (document, _) in zip(alive, result, strict=True):
            documents[i] = document
        batch = Batch(documents, self.is_code)
        if "analysis" in self.__dict__ and all(documents[i].text is self.documents[i].text for i in left):
            batch.__dict__["analysis"] = self.analysis
        return batch, left


def run_step(step: Any, batch: Batch, alive: Sequence[int]) -> Result:
    """The verdicts of a step of any of the first three forms on the documents `alive` of a batch."""
    if hasattr(step, "run"):
        return step.run(batch.only(alive))
    if hasattr(step, "judge"):
        reasons = step.judge(batch.analysis)
        return [(batch.documents[i], reasons[i]) for i in alive]
    edited = step.edit(batch.analysis)
    return [(with_text(batch.documents[i], edited[i][0]), edited[i][1]) for i in alive]


class Hit(str):
    """A reason that is to be listed one by one in decontamination.jsonl, with these details."""

    details: dict[str, Any]

    def __new__(cls, reason: str, **details: Any) -> Hit:
        hit = super().__new__(cls, reason)
        hit.details = details
        return hit


def with_text(document: Document, text: str) -> Document:
    """The document with this text; itself where that is the same."""
    return document if text == document.text else dataclasses.replace(document, text=text)


def with_meta(document: Document, **values: Any) -> Document:
    """The document with these entries in its meta."""
    return dataclasses.replace(document, meta={**document.meta, **values})


def category(reason: str) -> str:
    """What reasons are counted by: the words before a colon, the first number as …"""
    return re.sub(r"(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?", "…", reason.partition(": ")[0], count=1)
