"""Files of documents: parts, the units of work between steps, and shards, the result.

A part is an Arrow file with zstd level 1 (about 500 MB/s written, 1 GB/s read), written and read batch by batch, so
that a worker never holds a whole part. A shard is Parquet or JSONL with zstd level 3 and checksums. Both have the
columns text, id, source, url, date and meta (a JSON object in a string, so that every file has one schema). All are
written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from arriero.curate.document import Document
from arriero.errors import DataError, require
from arriero.io import reading
from arriero.io.files import json_bytes, json_line, replaced_file

SCHEMA = pa.schema([(name, pa.large_string() if name == "text" else pa.string()) for name in (
    "text", "id", "source", "url", "date", "meta",
)])  # fmt: skip
BATCH_CHARACTERS = 2_000_000  # characters that go through the steps at a time
BATCH_DOCUMENTS = 2_000
ShardFormat = Literal["parquet", "jsonl.zst"]


class PartWriter:
    """Appends documents to a part that is not yet there."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.documents = self.characters = self.bytes = 0

    def write(self, documents: list[Document]) -> None:
        """Append documents as one batch."""
        if documents:
            batch = to_arrow(documents)
            self._file.write_batch(batch)
            self.documents += len(documents)
            self.characters += sum(len(document.text) for document in documents)
            self.bytes += pa.compute.sum(pa.compute.binary_length(batch.column("text"))).as_py()


@contextmanager
def new_part(path: Path) -> Iterator[PartWriter]:
    """A writer of a part that appears at `path` when the block ends without an error."""
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
    with (
        replaced_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA, options=options) as file,
    ):
        yield PartWriter(file)


def read_part(path: Path) -> Iterator[list[Document]]:
    """The documents of a part in batches fit for the steps."""
    gathered: list[Document] = []
    for documents in _stored_batches(path):
        gathered += documents
        if sum(len(d.text) for d in gathered) >= BATCH_CHARACTERS or len(gathered) >= BATCH_DOCUMENTS:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def read_document(path: Path, row: int) -> Document:
    """One document of a part."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            if row < batch.num_rows:
                return from_arrow(batch.slice(row, 1))[0]
            row -= batch.num_rows
    raise AssertionError(f"{path} has no row {row}")


def _stored_batches(path: Path) -> Iterator[list[Document]]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        for number in range(file.num_record_batches):
            yield from_arrow(file.get_batch(number))


def to_arrow(documents: list[Document]) -> pa.RecordBatch:
    """Documents as a batch of `SCHEMA`."""
    columns = [
        [d.text for d in documents],
        [d.id for d in documents],
        [d.source for d in documents],
        [d.url for d in documents],
        [d.date for d in documents],
        [json_bytes(d.meta) if d.meta else b"{}" for d in documents],
    ]
    return pa.RecordBatch.from_arrays(
        [pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA
    )


def from_arrow(batch: pa.RecordBatch) -> list[Document]:
    """The way back."""
    columns = [column.to_pylist() for column in batch.columns]
    return [
        Document(text, id_, source, url, date, {} if meta == "{}" else json.loads(meta))
        for text, id_, source, url, date, meta in zip(*columns, strict=True)
    ]


# Shards


def write_shard(path: Path, parts: Iterable[Path], form: ShardFormat) -> dict[str, Any]:
    """Write the documents of some parts as one shard; returns its entry for the manifest."""
    batches = (batch for part in parts for batch in _stored_batches(part))
    with replaced_file(path) as temporary:
        write = _write_parquet if form == "parquet" else _write_jsonl
        documents, characters = write(temporary, batches)
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
    return {"file": path.name, "documents": documents, "characters": characters, "bytes": size, "sha256": digest}


def _write_parquet(path: Path, batches: Iterable[list[Document]]) -> tuple[int, int]:
    documents = characters = 0
    with pa.parquet.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=3) as file:
        for batch in batches:
            file.write_batch(to_arrow(batch))
            documents += len(batch)
            characters += sum(len(document.text) for document in batch)
    return documents, characters


def _write_jsonl(path: Path, batches: Iterable[list[Document]]) -> tuple[int, int]:
    compressor = require("zstandard", "data").ZstdCompressor(level=3, write_checksum=True)
    documents = characters = 0
    with open(path, "wb") as raw, compressor.stream_writer(raw, closefd=False) as file:
        for batch in batches:
            for document in batch:
                file.write(document_line(document))
            documents += len(batch)
            characters += sum(len(document.text) for document in batch)
    return documents, characters


def document_line(document: Document) -> bytes:
    """A document as a line of JSON; what it has not is left out."""
    row = {
        "id": document.id,
        "text": document.text,
        "source": document.source,
        "url": document.url,
        "date": document.date,
    }
    row = {key: value for key, value in row.items() if value or key in ("id", "text")}
    return json_line(row | ({"meta": document.meta} if document.meta else {}))


# What is said of them


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that we wrote."""
    return reading.read_json(path, remedy="remove the directory of the curation, and curate again", refusal=DataError)
