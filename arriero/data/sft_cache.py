"""The cache of tokenised conversations: made once by worker processes, memory-mapped by every later run.

    CACHE/NAME/                NAME is a hash of all that decides the bytes: the contents of the data files, the
                               tokenizer's fingerprint, FORMAT
        tokens.bin             int32 [T]: ids end to end
        trained.bin            bool [T]: which of them are learned
        offsets.npy            int64 [n + 1]: example i is tokens offsets[i] to offsets[i + 1]
        hashes.npy             uint64 [n]: of each example's content
        rows.npy, files.npy    int64, int32 [n]: where each came from
        unused.json            for each file, which of its columns are in no example
        NAME.npy               what else is known of the examples (preferences.py)

Two processes may build the same cache at once: each writes under a temporary name of its own, then renames.

Price: 5 bytes of disk a token; the speeds are in docs/log.md.

n examples, T tokens of all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from arriero.data.formats import Conversation, parse_record
from arriero.errors import DataError
from arriero.io import paths
from arriero.io.files import temporary_name, write_json
from arriero.io.records import Record, read_records
from arriero.show.progress import progress
from arriero.system.pool import in_order
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_training

FORMAT = 2  # goes up when the same input would give other bytes
CHUNK = 256  # rows that a worker gets at once
IN_PROCESS = 2**23  # bytes of source below which they are tokenised here: starting workers would take longer
INDEX = {"offsets": np.int64, "hashes": np.uint64, "rows": np.int64, "files": np.int32}


def cache_directory(cache_dir: str | Path | None) -> Path:
    """Where tokenised data is kept: `cache_dir`, else `data` in Arriero's cache."""
    return paths.cache_dir() / "data" if cache_dir is None else Path(cache_dir)


def cache_key(files: Sequence[Path], tokenizer: Tokenizer, kind: str = "") -> str:
    """SHA-256 of the files' contents (not their names), the tokenizer's fingerprint, the format, and `kind`."""
    digest = hashlib.sha256(f"{FORMAT}{kind}\0{tokenizer.fingerprint}".encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    return digest.hexdigest()[:40]


# Encoding


@dataclass(frozen=True)
class EncodedRows:
    """Consecutive examples of one file, end to end."""

    file: str
    tokens: NDArray[np.int32]  # [T of all]
    trained: NDArray[np.bool_]  # [T of all]
    lengths: NDArray[np.int64]  # [n]
    hashes: NDArray[np.uint64]  # [n]
    rows: NDArray[np.int64]  # [n]
    unused: frozenset[str]  # columns that no example holds
    more: dict[str, NDArray[Any]] = field(default_factory=dict)  # what else is known of them, by name


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Token ids and mask of one conversation; raises DataError with its file and row."""
    try:
        encoded = encode_training(tokenizer, conversation.messages, conversation.tools)
    except DataError as error:
        raise DataError(f"{conversation.where}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{conversation.where}: a message is nested too deeply; flatten it or drop the row") from error
    if not any(encoded.trained[1:]):  # nothing precedes the first token, so nothing predicts it
        raise DataError(
            f"{conversation.where}: nothing to learn: no token is trained; check the answers or drop the row"
        )
    return encoded.ids, encoded.trained


def content_hash(conversation: Conversation) -> int:
    """64 bits of the SHA-256 of the messages and tools."""
    content = json.dumps([conversation.messages, conversation.tools], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little")


def encode_records(tokenizer: Tokenizer, records: Sequence[Record]) -> EncodedRows:
    """Encode the rows of one chunk, which all come from one file."""
    conversations = [parse_record(record) for record in records]
    encoded = [encode_conversation(tokenizer, conversation) for conversation in conversations]
    return end_to_end(conversations, encoded)


def end_to_end(conversations: Sequence[Conversation], encoded: Sequence[tuple[list[int], list[bool]]]) -> EncodedRows:
    """These conversations of one file, as they were encoded."""
    return EncodedRows(
        conversations[0].file,
        np.fromiter(chain.from_iterable(ids for ids, _ in encoded), dtype=np.int32),
        np.fromiter(chain.from_iterable(trained for _, trained in encoded), dtype=np.bool_),
        np.array([len(ids) for ids, _ in encoded], dtype=np.int64),
        np.array([content_hash(conversation) for conversation in conversations], dtype=np.uint64),
        np.array([conversation.row for conversation in conversations], dtype=np.int64),
        frozenset().union(*(conversation.unused for conversation in conversations)),
    )


def encode_files(
    files: Sequence[Path], encode: Callable[[Sequence[Record]], EncodedRows], workers: int, console: Console
) -> Iterator[EncodedRows]:
    """Encode all rows of the files, in order, with a progress bar; small sources in this process."""
    workers = workers or os.cpu_count() or 1
    sizes = {str(path): path.stat().st_size for path in files}
    with progress("tokenising", sum(sizes.values()), console) as bar:
        finished = 0

        def chunks() -> Iterator[list[Record]]:
            nonlocal finished
            for path in files:
                chunk: list[Record] = []
                for record in read_records(path):
                    chunk.append(record)
                    if len(chunk) == CHUNK:
                        bar.reach(finished + record.done * sizes[str(path)])
                        yield chunk
                        chunk = []
                finished += sizes[str(path)]
                if chunk:
                    yield chunk

        if sum(sizes.values()) < IN_PROCESS:
            workers = 1
        n_rows = 0
        for _, part in in_order(encode, chunks(), workers, "tokenising"):
            n_rows += len(set(part.rows.tolist()))
            bar.say(f"{n_rows:,} rows, {n_rows / bar.elapsed:,.0f} rows/s")
            yield part
        bar.reach(sum(sizes.values()))


# Writing


def write_cache(directory: Path, files: Sequence[Path], encoded: Iterable[EncodedRows]) -> None:
    """Write all parts under a temporary name, sync, and rename; if another process was first, its copy stays."""
    temporary = temporary_name(directory)
    try:
        temporary.mkdir(parents=True)
        _write_parts(temporary, files, encoded)
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    except OSError as error:
        raise DataError(
            f"cannot write tokenised data to {directory.parent} ({error.strerror}); "
            "free disk space, or name another directory in ARRIERO_CACHE"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_parts(directory: Path, files: Sequence[Path], encoded: Iterable[EncodedRows]) -> None:
    number = {str(path): i for i, path in enumerate(files)}
    lengths, hashes, rows, file_numbers = [], [], [], []
    more: dict[str, list[NDArray[Any]]] = {}
    unused: list[set[str]] = [set() for _ in files]
    with open(directory / "tokens.bin", "wb") as tokens, open(directory / "trained.bin", "wb") as trained:
        for part in encoded:
            tokens.write(part.tokens.tobytes())
            trained.write(part.trained.tobytes())
            lengths.append(part.lengths)
            hashes.append(part.hashes)
            rows.append(part.rows)
            file_numbers.append(np.full(len(part.rows), number[part.file]))
            unused[number[part.file]] |= part.unused
            for name, values in part.more.items():
                more.setdefault(name, []).append(values)
        for file in (tokens, trained):
            file.flush()
            os.fsync(file.fileno())
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    columns = (offsets, np.concatenate(hashes), np.concatenate(rows), np.concatenate(file_numbers))
    for (name, dtype), column in zip(INDEX.items(), columns, strict=True):
        np.save(directory / f"{name}.npy", column.astype(dtype), allow_pickle=False)
    for name, parts in more.items():
        np.save(directory / f"{name}.npy", np.concatenate(parts), allow_pickle=False)
    write_json(directory / "unused.json", [sorted(names) for names in unused])
