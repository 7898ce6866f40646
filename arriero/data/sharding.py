"""Text to token shards: `arriero shard`. shards.py describes the files.

The main process only reads, and leaves the rest to the workers: lines of JSONL are sent unparsed, files of a single
document unopened. The workers parse documents, decide which are held out, and encode (`tokenizer/parallel.py`). The
main process writes the results in the order of the documents (`shard_writer.py`), so the bytes are the same for any
number of workers, and a killed run continues from the last committed part.

Each document is enclosed in the begin and end tokens of its tokenizer's family (`document_marks`). Documents without
text are left out. A hash of the text decides what is held out, so equal texts are in the same split.

Price: encoding, at the speed of `tokenizer/parallel.py` on every core; the rest is counted in docs/log.md. Memory for
about four chunks a worker.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from arriero.curate.document import Document
from arriero.curate.sources import Position, Reading, SourceFile, from_record, list_files, read_documents, read_file
from arriero.curate.warc import PassedOver
from arriero.data.shard_writer import MarkedDocuments, SetName, ShardWriter, State
from arriero.data.shards import (
    FORMAT,
    ONE_SOURCE,
    SPLITS,
    TRAIN,
    VALIDATION,
    Shards,
    open_sources,
    token_type,
)
from arriero.errors import DataError, check
from arriero.io.limits import remedy
from arriero.io.paths import as_path
from arriero.io.records import Record, read_records
from arriero.show.progress import Bar, progress
from arriero.show.terminal import notes
from arriero.system.pool import in_order
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.parallel import DocumentEncoder

CHUNK = 2**20  # bytes of source that a worker gets at once
PART = 2**28  # bytes of source that are committed at once
IN_PROCESS = 2**23  # bytes of source below which this process encodes: starting workers would take longer
ONE_DOCUMENT = ("prose", "html", "code")  # kinds of files that workers open


def document_marks(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids that go before and after every document, by the tokenizer's family; None for no such token.

    Llama 3: begin_of_text and end_of_text, whatever a chat model's own end of turn is. GPT-2's and SmolLM2's byte-level
    vocabularies: endoftext after. Llama 1 and 2: <s> and </s>. Raises DataError where nothing marks an end.
    """
    ids = tokenizer.special_ids
    if "<|begin_of_text|>" in ids and "<|end_of_text|>" in ids:
        return ids["<|begin_of_text|>"], ids["<|end_of_text|>"]
    if "<|endoftext|>" in ids:
        return None, ids["<|endoftext|>"]
    if tokenizer.eos_id is None:
        raise DataError(
            "the tokenizer names no token that ends a text, so a model could never learn to stop; name one as its "
            f"eos token (its special tokens: {', '.join(ids) or 'none'})"
        )
    return tokenizer.bos_id, tokenizer.eos_id


def shard_sources(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    text_key: str = "text",
    validation: str | float = 0.01,
    by_source: bool = False,
    workers: int = 0,
    part_size: int = PART,
    console: Console | None = None,
) -> dict[str, dict[str, Shards]]:
    """Tokenise the documents of `sources` (whose kinds are in `curate/sources.py`) into `out`, or resume that.

    validation: the share of documents to hold out, by a hash of their text, or a source of held-out documents, whose
    texts are then left out of training. by_source: a set for each `Document.source`, so that they can be weighted.
    workers: encoding processes, 0 for one a core. part_size: bytes of source that are committed at once.
    Returns {"train": {source: shards}, "validation": ...}. Raises ConfigError, or DataError with the file and row.
    """
    check(bool(sources), "no source is given; name a file, a directory, 'stdlib', or a Hub data set id (owner/name)")
    check(workers >= 0, f"workers is {workers}; give a number of processes, or 0 for one a core")
    share, held_out_source = parse_validation(validation)
    held_out_files = list_files([held_out_source]) if held_out_source is not None else []
    files = [*held_out_files, *list_files(sources)]
    stats = [file.path.stat() for file in files]
    sizes = [stat.st_size for stat in stats]
    reading = Reading(text_key)
    listed = [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    changed = datetime.fromtimestamp(max(stat.st_mtime for stat in stats), UTC).isoformat(" ", "seconds")
    request = {
        "files": f"{len(files):,} with {sum(sizes):,} bytes, the last changed at {changed} ({digest[:16]})",
        "text_key": text_key,
        "validation": str(validation),
    }
    texts = read_documents([held_out_source], text_key) if held_out_source is not None else ()
    encode = Encode(tokenizer, reading, share, by_source, frozenset(text_hash(d.text) for d in texts))
    if not workers and sum(sizes) < IN_PROCESS:
        workers = 1

    def items(start: Position) -> Iterator[Item]:
        return read_items(files, start, reading, n_held_out=len(held_out_files))

    return _shard(items, encode, as_path(out), request, part_size, workers, sizes, console)


def parse_validation(validation: str | float) -> tuple[float, str | None]:
    """(share, None), or (0, the source that it names)."""
    try:
        share = float(validation)
    except ValueError:
        return 0.0, str(validation)
    if not 0 <= share < 1:
        raise DataError(f"validation is {validation}; give a share of the documents from 0 to below 1, or a source")
    return share, None


def summary_table(sets: dict[str, dict[str, Shards]]) -> Table:
    """What was written, as a table for the terminal."""
    table = Table(title="token shards")
    for column in ("split", "source", "documents", "tokens", "bytes a token"):
        table.add_column(column, justify="left" if column in ("split", "source") else "right")
    for split, by_source in sets.items():
        for name, s in by_source.items():
            table.add_row(split, name, f"{s.n_documents:,}", f"{s.n_tokens:,}", f"{s.n_bytes / s.n_tokens:.2f}")
    return table


def text_hash(text: str) -> int:
    """64 bits of a text's SHA-256: on which side of the split it falls."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")


# Reading: as little as has to be done in one process


@dataclass(frozen=True)
class Item:
    """Something that a worker makes a document of, and the position after it."""

    what: Document | PassedOver | SourceFile | tuple[SourceFile, Record]
    size: int  # bytes of source, or characters
    position: Position
    done: float = 0.0  # share of the position's file that has been read
    held_out: bool = False


@dataclass(frozen=True)
class Chunk:
    """Consecutive items on their way to a worker, all held out by their file or none."""

    items: list[Item]
    ends_part: bool


def read_items(files: Sequence[SourceFile], start: Position, reading: Reading, n_held_out: int = 0) -> Iterator[Item]:
    """What documents are made of, after `start`; the first `n_held_out` files are held out."""
    for i in range(start.file, len(files)):
        file, after = files[i], start.row if i == start.file else 0
        held_out = i < n_held_out
        if file.kind == "rows":
            for record in read_records(
                file.path, after, lambda name, holds_bytes: name in (reading.text_key, "source")
            ):
                size = len(record.raw if isinstance(record.raw, bytes) else str(record.raw.get(reading.text_key)))
                yield Item((file, record), size, Position(i, record.row), record.done, held_out)
        elif file.kind in ONE_DOCUMENT:
            if not after:
                yield Item(file, file.path.stat().st_size, Position(i, 1), 1.0, held_out)
        else:
            for row, found in read_file(file, after, reading):
                if isinstance(found, DataError):
                    raise found
                size = 0 if isinstance(found, PassedOver) else len(found.text)
                yield Item(found, size, Position(i, row), 0.0, held_out)


def chunked(items: Iterable[Item], part_size: int) -> Iterator[Chunk]:
    """Group items; a part ends with the chunk that fills it, so a run that goes on after a part groups as before."""
    chunk: list[Item] = []
    size = part = 0
    for item in items:
        if chunk and (size >= CHUNK or item.held_out != chunk[-1].held_out):
            part += size
            yield Chunk(chunk, ends_part=part >= part_size)
            chunk, size, part = [], 0, 0 if part >= part_size else part
        chunk.append(item)
        size += item.size
    if chunk:
        yield Chunk(chunk, ends_part=True)


# Encoding: in the workers


@dataclass(frozen=True)
class Result:
    """A chunk's documents as ids, by set; how many were left out, by reason; UTF-8 bytes of all texts."""

    encoded: dict[SetName, MarkedDocuments]
    left_out: dict[str, int]
    n_bytes: int


@dataclass(frozen=True)
class Encode:
    """Makes ids of a chunk. held_out: hashes of texts that are not to be trained on."""

    tokenizer: Tokenizer
    reading: Reading
    validation: float
    by_source: bool
    held_out: frozenset[int]

    def __call__(self, chunk: Chunk) -> Result:
        by_set: dict[SetName, list[str]] = {}
        left_out: dict[str, int] = {}
        for item in chunk.items:
            document = self._document(item)
            if isinstance(document, PassedOver):
                left_out[document.reason] = left_out.get(document.reason, 0) + 1
                continue
            split = self._split(document.text, item.held_out)
            if split in SPLITS:
                name = document.source if self.by_source and document.source else ONE_SOURCE
                by_set.setdefault((split, name), []).append(document.text)
            else:
                left_out[split] = left_out.get(split, 0) + 1
        encoded = {name: self._encode(texts) for name, texts in by_set.items()}
        return Result(encoded, left_out, sum(int(e.text_bytes.sum()) for e in encoded.values()))

    def _document(self, item: Item) -> Document | PassedOver:
        if isinstance(item.what, Document | PassedOver):
            return item.what
        if isinstance(item.what, SourceFile):
            [(_, found)] = read_file(item.what, reading=self.reading)
            if isinstance(found, DataError):
                raise found
            return found
        file, record = item.what
        return from_record(record, file, self.reading)

    def _split(self, text: str, held_out: bool) -> str:
        """The split that a text goes to, or the reason why it goes to none."""
        if not text or text.isspace():
            return "empty"
        if held_out:
            return VALIDATION
        hash_ = text_hash(text)
        if hash_ in self.held_out:
            return "held out"
        return VALIDATION if hash_ < int(self.validation * 2**64) else TRAIN

    def _encode(self, texts: list[str]) -> MarkedDocuments:
        before, after = document_marks(self.tokenizer)
        encoded = self._encoder.encode(texts, before=before, after=after)
        tokens = encoded.ids.astype(token_type(self.tokenizer.vocab_size))
        text_bytes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
        return MarkedDocuments(tokens, np.diff(encoded.offsets), text_bytes)

    @cached_property
    def _encoder(self) -> DocumentEncoder:
        return DocumentEncoder(self.tokenizer, parallel=False)


# All of it


def _shard(
    items: Callable[[Position], Iterator[Item]],
    encode: Encode,
    out: Path,
    request: dict[str, Any],
    part_size: int,
    workers: int,
    sizes: Sequence[int],
    console: Console | None,
) -> dict[str, dict[str, Shards]]:
    """items: what documents are made of, after a position. sizes: bytes of each file, for the progress bar."""
    bos, eos = document_marks(encode.tokenizer)
    own = {"format": FORMAT, "tokenizer": encode.tokenizer.fingerprint, "bos": bos, "eos": eos}
    request = own | request | {"by_source": encode.by_source, "part_size": part_size}
    try:
        with (
            ShardWriter(out, encode.tokenizer, request, encode.by_source) as writer,
            progress("sharding", sum(sizes) or None, console) as bar,
        ):
            if not writer.state.complete:
                chunks = chunked(items(Position(*writer.state.position)), part_size)
                _write_chunks(writer, encode, chunks, workers or os.cpu_count() or 1, sizes, bar)
                if refusal := _refusal(writer.state, encode):
                    writer.discard()
                    raise DataError(f"{out}: {refusal}")
                writer.finish()
            if left_out := writer.state.left_out:
                counted = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
                (console or notes()).print(f"left out: {counted}", highlight=False, markup=False)
    except OSError as error:
        if error.errno in (None, errno.EPIPE):
            raise
        place = out if error.filename is None else error.filename  # a full disk comes without a name
        raise DataError(f"{place}: {error.strerror}; {remedy(error)}, and run again: it goes on from there") from error
    return {split: open_sources(out / split) for split in SPLITS if (out / split).is_dir()}


def _write_chunks(
    writer: ShardWriter, encode: Encode, chunks: Iterable[Chunk], workers: int, sizes: Sequence[int], bar: Bar
) -> None:
    """Encode chunks in worker processes, and write and commit them in their order."""
    before, n_bytes = np.cumsum([0, *sizes]), 0
    for chunk, result in in_order(encode, chunks, workers, "tokenising"):
        last = chunk.items[-1]
        writer.add(result.encoded, result.left_out, last.position)
        if chunk.ends_part:
            writer.commit()
        n_bytes += result.n_bytes
        bar.say(f"{n_bytes / 1e6 / bar.elapsed:.1f} MB/s of text")
        bar.reach(float(before[last.position.file] + last.done * sizes[last.position.file]))


def _refusal(state: State, encode: Encode) -> str:
    """Why what was written is of no use, or nothing."""
    found = {name.partition("/")[0] for part in state.parts for name in part}
    if TRAIN not in found:
        return f"no document is left to train on (left out: {state.left_out or 'none'})"
    if encode.validation and VALIDATION not in found:
        return (
            f"a validation share of {encode.validation} holds out none of these few documents; "
            "raise it, name a file of held-out documents, or give 0"
        )
    return ""
