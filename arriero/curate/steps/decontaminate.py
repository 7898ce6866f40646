"""Drops documents that share n-grams with evaluation sets, and lists what was hit.

GPT-3 (Brown et al. 2020, appendix C) searched for 13-grams of lower-case words without punctuation, and for shorter
evaluation texts as a whole, from 8 words on; so does this step, which also ignores accents but not numbers. One match
drops the document. Short answers ("18") occur by accident in any corpus, and are not searched for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arriero.curate.analysis import Analysis, analyse
from arriero.curate.batch import Batch, Hit, Result
from arriero.curate.rules.llama import _ngram_hashes
from arriero.curate.sources import list_files, read_file
from arriero.curate.spans import HAS_LETTER
from arriero.curate.warc import PassedOver
from arriero.errors import ConfigError, DataError
from arriero.io.files import split_lines
from arriero.io.paths import PathText
from arriero.io.records import parse_row, read_records


@dataclass(frozen=True)
class Decontaminate:
    """Drop documents that share an n-gram with evaluation files, and list each in decontamination.jsonl.

    Costs about 2 microseconds for each thousand characters, and 12 bytes for each n-gram of the evaluation files.
    """

    name: ClassVar[str] = "decontaminate"

    against: tuple[PathText, ...] = ()
    """Evaluation files: rows (every text in them is searched), or plain text (every line is)."""
    ngram: int = 13
    """Words of an n-gram."""
    min_words: int = 8
    """Evaluation texts of fewer words than an n-gram are searched whole; of fewer than this, not at all."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.ngram:
            raise ConfigError(
                f"decontaminate.min_words is {self.min_words} and ngram {self.ngram}; both at least 1, in this order"
            )

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files whose content decides what the step does."""
        return tuple(file.path for file in list_files(self.against))

    def run(self, batch: Batch) -> Result:
        """Drop each document with a match; the reason names the evaluation row."""
        index, analysis = _index(self), batch.analysis
        words, first = _words(analysis)
        places = np.flatnonzero(analysis.folded != 0)
        document = np.repeat(np.arange(len(analysis)), np.diff(first))
        hits: dict[int, Hit] = {}
        for size, (hashes, items) in index.by_size.items():
            grams = _ngram_hashes(words, size)
            at = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
            found = (hashes[at] == grams) & (document[: len(grams)] == document[size - 1 :])
            for start in np.flatnonzero(found)[::-1].tolist():
                item = index.items[int(items[at[start]])]
                i = int(document[start])
                begin = int(analysis.words.start[places[start]] - analysis.documents[i])
                end = int(analysis.words.start[places[start + size - 1]] - analysis.documents[i])
                end += int(analysis.words.length[places[start + size - 1]])
                text = batch.documents[i].text[begin:end]
                hits[i] = Hit(f"in {item.file}: row {item.row}", evaluation=item.file, row=item.row, text=text)
        return [(document, hits.get(i)) for i, document in enumerate(batch.documents)]


def _words(analysis: Analysis) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """As `Analysis.content`, but for numbers, which are hashed unchanged: 1, 2, 3 is not 7, 8, 9."""
    words, (_, first) = analysis.words, analysis.content
    hashes = np.where((words.kind & HAS_LETTER) > 0, analysis.folded, words.hash)
    return hashes[analysis.folded != 0], first


class Item(NamedTuple):
    """One evaluation row."""

    file: str
    row: int


class Index(NamedTuple):
    """by_size: n -> sorted hashes of n-grams, and for each the number of its item."""

    items: list[Item]
    by_size: dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]]


@functools.lru_cache(2)
def _index(step: Decontaminate) -> Index:
    items: list[Item] = []
    found: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
    for item, text in evaluation_texts(step.against):
        words, _ = _words(analyse([text]))
        if len(words) < step.min_words:
            continue
        if not items or items[-1] != item:
            items.append(item)
        size = min(step.ngram, len(words))
        found.setdefault(size, []).append((_ngram_hashes(words, size), len(items) - 1))
    if not items:
        raise DataError(
            f"{', '.join(step.against)}: no text of {step.min_words} words or more to search for; lower "
            "decontaminate.min_words"
        )
    by_size = {}
    for size, grams in sorted(found.items()):
        hashes = np.concatenate([hashes for hashes, _ in grams])
        numbers = np.repeat([number for _, number in grams], [len(hashes) for hashes, _ in grams])
        by_size[size] = (hashes[order := np.argsort(hashes, kind="stable")], numbers[order])
    return Index(items, by_size)


def evaluation_texts(sources: tuple[str, ...]) -> Iterator[tuple[Item, str]]:
    """Every text of every row, or every line of a plain text, with its place."""
    for file in list_files(sources):
        if file.kind == "rows":
            for record in read_records(file.path, 0, lambda name, holds_bytes: not holds_bytes):
                for text in _texts(parse_row(record)):
                    yield Item(file.name, record.row), text
        else:
            for row, found in read_file(file):
                if isinstance(found, DataError):
                    raise found
                if isinstance(found, PassedOver):
                    continue
                lines = split_lines(found.text) if file.kind == "prose" else [found.text]
                for number, line in enumerate(lines, start=1):
                    yield Item(file.name, number if file.kind == "prose" else row), line


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
