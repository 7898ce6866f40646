"""The tasks of a curation: read a unit of the sources into parts, run a part through a stage, reduce a range of keys,
write a shard.

Each task reads files and writes files that appear whole; if they exist already it returns at once. Its output depends
on its arguments only, not on the process or the order. A part is NAME.arrow (documents), NAME.npy (the keys for a
corpus step) and last NAME.json, its record; a part with a record is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.curate.batch import Batch, Hit, Result, run_step
from arriero.curate.config import KINDS, CurateConfig, stages
from arriero.curate.document import Document
from arriero.curate.executor import one_thread
from arriero.curate.parts import (
    BATCH_CHARACTERS,
    BATCH_DOCUMENTS,
    PartWriter,
    new_part,
    read_document,
    read_json,
    read_part,
    write_shard,
)
from arriero.curate.sources import START, Position, Reading, SourceFile, read_from
from arriero.curate.stats import Json, StepStats, count_documents
from arriero.curate.steps.corpus import Decisions, KeyFile, Range, Twin
from arriero.errors import DataError
from arriero.io.files import replaced_file, write_json

MB = 1_000_000
ERRORS_SHOWN = 20


# Reading


def read_unit(config: CurateConfig, directory: Path, number: int, files: Sequence[SourceFile]) -> None:
    """Read some source files into parts named NUMBER-0, NUMBER-1, ...; resumes after the last one that exists."""
    one_thread()
    position, part = START, 0
    while (record := directory / f"{number:06d}-{part:06d}.json").exists():
        after = read_json(record)["next"]
        if after is None:
            return
        position, part = Position(*after), part + 1
    errors: list[str] = []

    def skip(error: DataError) -> None:
        if config.on_error == "stop":
            raise DataError(f"{error} (--on-error skip counts such rows and goes on)")
        errors.append(str(error))

    passed_over: Counter[str] = Counter()
    documents = read_from(
        files,
        position,
        Reading(config.text_key, config.html),
        on_error=skip,
        on_passed=lambda passed: passed_over.update([passed.reason]),
    )
    while _fill_part(config, directory / f"{number:06d}-{part:06d}", documents, errors, passed_over):
        part += 1


def _fill_part(
    config: CurateConfig,
    base: Path,
    documents: Iterator[tuple[Document, Position]],
    errors: list[str],
    passed_over: Counter[str],
) -> bool:
    """Fill one part with the next documents; returns whether there may be more.

    errors, passed_over: what is met on the way, until it is written down.
    """
    counts: Json = {}
    after: Position | None = None
    with new_part(base.with_suffix(".arrow")) as writer:
        batch: list[Document] = []
        characters, room = 0, config.part_mb * MB
        for document, position in documents:
            batch.append(document)
            characters += len(document.text)
            if characters >= min(BATCH_CHARACTERS, room) or len(batch) >= BATCH_DOCUMENTS:
                writer.write(batch)
                count_documents(counts, batch)
                room, characters, batch = room - characters, 0, []
                if room <= 0:
                    after = position
                    break
        writer.write(batch)
        count_documents(counts, batch)
    found = {"count": len(errors), "first": errors[:ERRORS_SHOWN]} if errors else {}
    record = {"counts": counts, "errors": found, "passed_over": dict(passed_over), "next": after}
    _finish_part(base, writer, record)
    errors.clear()
    passed_over.clear()
    return after is not None


def _finish_part(base: Path, writer: PartWriter, record: Json) -> None:
    empty = {"counts": {}, "steps": {}, "examples": {}, "errors": {}, "passed_over": {}, "hits": [], "keys": 0}
    size = {"documents": writer.documents, "characters": writer.characters, "bytes": writer.bytes}
    write_json(base.with_suffix(".json"), {"name": base.name, **size, **empty, **record})


# Stages


def take_stage(
    config: CurateConfig, source: Path, directory: Path, number: int, index: int, names: Sequence[str], start: int
) -> None:
    """Take part `index` of `names` through one stage: apply the decisions of the corpus step before, take the steps,
    leave keys. `start`: documents in the parts before it."""
    one_thread()
    base = directory / names[index]
    if base.with_suffix(".json").exists():
        return
    first, steps, last = stages(config)[number]
    decisions = None if first is None else _decisions(source, names, index, start)
    passage = Passage(config, first, steps, decisions)
    collector = None if last is None else config.step(last)
    collected: list[Any] = []
    counts: Json = {}
    row = 0
    with new_part(base.with_suffix(".arrow")) as writer:
        for documents in read_part(source / f"{names[index]}.arrow"):
            kept = passage.through(documents, row)
            row += len(documents)
            if collector is not None and kept:
                collected += _collect(collector, str(last), kept, writer.documents, config.code_sources)
            writer.write(kept)
            count_documents(counts, kept)
    keys = [] if collector is None else collector.pack(collected)
    if collector is not None:
        _save(base.with_suffix(".npy"), keys)
    _finish_part(base, writer, {"counts": counts, "keys": len(keys), "hits": passage.hits, **passage.stats.to_json()})


def _decisions(source: Path, names: Sequence[str], index: int, start: int) -> Decisions:
    """What the corpus step decided on the documents of a part."""
    arrays = Mapped(sorted((source / "decisions").glob("[0-9]*.npy")))
    return Decisions(arrays, index, start, lambda part, row: read_document(source / f"{names[part]}.arrow", row))


@dataclass(frozen=True)
class Mapped:
    """The arrays of some files, each open while it is looked at: line-dedup of small buckets has thousands."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[Any]:
        return (np.load(path, mmap_mode="r") for path in self.paths)


class Passage:
    """One part on its way through the steps of one stage, with what they did to it."""

    def __init__(
        self, config: CurateConfig, first: str | None, steps: Sequence[str], decisions: Decisions | None
    ) -> None:
        self.config, self.first, self.decisions = config, first, decisions
        self.names = [*([first] if first else []), *steps]
        self.stats = StepStats(config.seed, config.examples)
        self.hits: list[Json] = []

    def through(self, documents: Sequence[Document], row: int) -> list[Document]:
        """Those of a batch that pass all steps, in order. `row`: the place of its first in the part."""
        passed: dict[int, Document] = {}
        for kind, places in split(documents, self.config.code_sources).items():
            batch = Batch([documents[i] for i in places], kind == "code")
            kept, alive = self._of_a_kind(kind, batch, [row + i for i in places])
            passed |= {places[i]: kept.documents[i] for i in alive}
        return [passed[i] for i in sorted(passed)]

    def _of_a_kind(self, kind: str, batch: Batch, rows: Sequence[int]) -> tuple[Batch, list[int]]:
        """The batch as the steps leave it, and which of its documents pass."""
        alive = list(range(len(rows)))
        orders = self.stats.orders(batch.documents)
        for name in self.names:
            if kind not in KINDS[name] or not alive:
                continue
            step = self.config.step(name)
            if name == self.first:
                assert self.decisions is not None
                result: Result = step.decide(batch.only(alive), [rows[i] for i in alive], self.decisions)
            else:
                result = run_step(step, batch, alive)
            before, their = [batch.documents[i] for i in alive], [orders[i] for i in alive]
            self.stats.count(name, before, result, their, self._twin)
            self.hits += [{"document": d.id, **reason.details} for d, reason in result if isinstance(reason, Hit)]
            batch, alive = batch.after(result, alive)
        return batch, alive

    def _twin(self, reason: str) -> Document | None:
        """The document that was kept instead of one dropped for this reason."""
        if isinstance(reason, Twin) and self.decisions is not None:
            return self.decisions.twin(reason.part, reason.row)
        return None


def _collect(step: Any, name: str, documents: list[Document], row: int, code_sources: Sequence[str]) -> list[Any]:
    """The step's records of documents that become rows `row`, `row` + 1, ... of a part."""
    return [
        step.collect(Batch([documents[i] for i in rows], kind == "code"), [row + i for i in rows])
        for kind, rows in split(documents, code_sources).items()
        if kind in KINDS[name]
    ]


def split(documents: Sequence[Document], code_sources: Sequence[str]) -> dict[str, list[int]]:
    """The indices of prose and of source code among the documents."""
    places: dict[str, list[int]] = {}
    for i, document in enumerate(documents):
        places.setdefault("code" if document.source in code_sources else "prose", []).append(i)
    return places


# Corpus steps and shards


def reduce_range(config: CurateConfig, name: str, keys: Sequence[KeyFile], piece: Range, path: Path) -> None:
    """Decide one range of keys of a corpus step."""
    one_thread()
    if not path.exists():
        _save(path, config.step(name).reduce(keys, piece))


def decision_path(directory: Path, number: int) -> Path:
    """The file of the decisions on one range."""
    return directory / "decisions" / f"{number:06d}.npy"


def finish_shard(config: CurateConfig, path: Path, parts: Sequence[Path], record: Path) -> None:
    """Write one shard and then its record."""
    one_thread()
    if not record.exists():
        write_json(record, write_shard(path, parts, config.format))


def _save(path: Path, array: Any) -> None:
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
