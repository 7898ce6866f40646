"""Statistics and examples of what the steps did, as plain JSON that can be added up over batches, parts and the corpus.

Examples are a random sample that does not depend on the order of work: those with the k smallest hashes of (seed, id,
step).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from arriero.curate.batch import Result, category
from arriero.curate.document import Document
from arriero.curate.spans import MASK, MULTIPLIER

Json = dict[str, Any]
EXCERPT = 700  # characters of an example
CONTEXT = 60  # of these, before what has changed
BINS_PER_DECADE = 5  # of the histograms of lengths
FATES = ("kept", "dropped", "changed")


def length_bin(characters: int) -> int:
    """The bin of a text's length: 5 for each power of ten."""
    return int(BINS_PER_DECADE * math.log10(max(1, characters)))


def count_documents(counts: Json, documents: Sequence[Document]) -> None:
    """Add documents to counts by source: documents, characters, and the histogram of lengths."""
    for document in documents:
        of_source = counts.setdefault(document.source, {"documents": 0, "characters": 0, "lengths": {}})
        add(of_source, {"documents": 1, "characters": len(document.text)})
        add(of_source["lengths"], {str(length_bin(len(document.text))): 1})


def add(total: Json, more: Json) -> Json:
    """Sum numbers, join lists, and go into tables; `total` is changed and returned."""
    for key, value in more.items():
        if isinstance(value, dict):
            add(total.setdefault(key, {}), value)
        else:
            total[key] = total[key] + value if key in total else value
    return total


class StepStats:
    """What the steps of one stage did to one part."""

    def __init__(self, seed: int, n_examples: int) -> None:
        self.seed, self.n_examples = seed, n_examples
        self.steps: Json = {}
        self.examples: Json = {}

    def orders(self, documents: Sequence[Document]) -> list[int]:
        """A random number for each document, of its id and the seed."""
        key = self.seed.to_bytes(8, "little", signed=True)
        digests = (hashlib.blake2b(d.id.encode("utf-8", "replace"), digest_size=8, key=key).digest() for d in documents)
        return [int.from_bytes(digest, "little") for digest in digests]

    def count(
        self,
        step: str,
        before: Sequence[Document],
        result: Result,
        orders: Sequence[int],
        twin: Callable[[str], Document | None],
    ) -> None:
        """Count what a step did to documents; `twin` gives the document that was kept instead, for a reason."""
        dropped: Json = {}
        changed = characters = 0
        of_step = zlib.crc32(step.encode())
        samples = self.examples.setdefault(step, {fate: [] for fate in FATES})
        for old, order, (new, reason) in zip(before, orders, result, strict=True):
            if reason is not None:
                add(dropped, {category(reason): 1})
                fate = "dropped"
                characters += len(old.text)
            elif new.text is old.text or new.text == old.text:
                fate = "kept"
            else:
                fate = "changed"
                changed += 1
                characters += len(old.text) - len(new.text)
            order = (order ^ of_step) * MULTIPLIER & MASK
            chosen = samples[fate]
            if len(chosen) < self.n_examples or (chosen and order < chosen[-1]["order"]):
                chosen.append({"order": order, **_example(fate, old, new, reason, twin)})
                chosen.sort(key=lambda e: (e["order"], e["id"]))
                del chosen[self.n_examples :]
        entry = {"seen": len(before), "dropped": dropped, "changed": changed, "characters_removed": characters}
        add(self.steps.setdefault(step, {}), entry)

    def to_json(self) -> Json:
        """Counts and examples, for the record of a part."""
        return {"steps": self.steps, "examples": self.examples}


def _example(
    fate: str, old: Document, new: Document, reason: str | None, twin: Callable[[str], Document | None]
) -> Json:
    example: Json = {"id": old.id, "source": old.source, "length": len(old.text)}
    if reason is not None:
        example["reason"] = str(reason)
        other = twin(reason)
        if other is not None:
            example |= {"twin_id": other.id, "twin": excerpt(other.text)}
    return example | (changes(old.text, new.text) if fate == "changed" else {"text": excerpt(old.text)})


def best_examples(total: Json, more: Json, n: int) -> None:
    """Take the examples of another part into those of `total`."""
    for step, fates in more.items():
        for fate, examples in fates.items():
            of_step = total.setdefault(step, {})
            of_step[fate] = sorted([*of_step.get(fate, []), *examples], key=lambda e: (e["order"], e["id"]))[:n]


def excerpt(text: str, length: int = EXCERPT) -> str:
    """The beginning of a text, and where it is long also a piece from its middle."""
    if len(text) <= length:
        return text
    half = length // 2
    middle = len(text) // 2
    return f"{text[:half]}\n[...]\n{text[middle : middle + half]}\n[...]"


def changes(old: str, new: str) -> Json:
    """What went and what came: the lines that differ, from shortly before the first difference in them."""
    before, after = old.split("\n"), new.split("\n")
    came, went = set(after), set(before)
    removed = "\n".join(line for line in before if line not in came)
    added = "\n".join(line for line in after if line not in went)
    same = next((i for i, (a, b) in enumerate(zip(removed, added, strict=False)) if a != b), 0)
    start = max(0, same - CONTEXT)
    return {"removed": _cut_out(removed, start), "added": _cut_out(added, start)}


def _cut_out(text: str, start: int) -> str:
    end = start + EXCERPT // 2
    return "[...] " * (start > 0) + text[start:end] + " [...]" * (end < len(text))
