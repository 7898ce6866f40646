"""Conversations as token ids with a loss mask: what fine-tuning reads.

`build_dataset` tokenises rows once (sft_cache.py); later runs open the cache. Settings of a run (the maximum length,
the validation share) only select examples from it, so changing them needs no tokenising. The tokens are memory-mapped;
only 28 bytes of index per row have to fit in memory.

n examples, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from arriero.data.formats import Conversation, parse_record, warn_of_unused
from arriero.data.pack import pack
from arriero.data.sft_cache import (
    INDEX,
    EncodedRows,
    cache_directory,
    cache_key,
    encode_files,
    encode_records,
    write_cache,
)
from arriero.data.splits import leave_out_long, splits
from arriero.errors import DataError
from arriero.io.records import Record, read_records, source_files
from arriero.show.terminal import notes
from arriero.tokenizer.base import Tokenizer

T = TypeVar("T")


class SftDataset:
    """Examples of token ids with their masks, memory-mapped; `select` makes views of the same files.

    `files` are the data files that the cache in `directory` was made from, wherever they are now. `lengths` [n] are
    token counts. Opening checks that the cache is whole.
    """

    def __init__(self, directory: Path, files: Sequence[Path], index: NDArray[np.int64] | None = None) -> None:
        self.directory, self.files = directory, files
        arrays = {name: np.load(self.directory / f"{name}.npy", allow_pickle=False) for name in INDEX}
        self._offsets, self._hashes, self._rows, self._files = (arrays[name] for name in INDEX)
        n_tokens = int(self._offsets[-1])
        self._tokens = self._map("tokens.bin", np.dtype(np.int32), n_tokens)
        self._trained = self._map("trained.bin", np.dtype(np.bool_), n_tokens)
        self.index = np.arange(len(self._offsets) - 1) if index is None else index
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def tokens(self, i: int) -> NDArray[np.int32]:
        """Token ids of example i, [T]."""
        return self._tokens[self._span(i)]

    def trained(self, i: int) -> NDArray[np.bool_]:
        """Which tokens of example i the model learns to predict, [T]."""
        return self._trained[self._span(i)]

    def where(self, i: int) -> str:
        """The file and row that example i came from."""
        file, row = self.place(i)
        return f"row {row} of {self.files[file]}"

    def place(self, i: int) -> tuple[int, int]:
        """The number of the file that example i came from, and its row there."""
        j = self.index[i]
        return int(self._files[j]), int(self._rows[j])

    @property
    def file_numbers(self) -> NDArray[np.int32]:
        """The number of the file that each example is from, [n]."""
        return self._files[self.index]

    def conversations(self, examples: Sequence[int]) -> list[Conversation]:
        """These examples as conversations, read again from the data files in one pass over them."""
        return read_again(self.files, [self.place(i) for i in examples], parse_record)

    def last_answer(self, i: int) -> tuple[list[int], list[int]]:
        """Example i as (prompt ids, answer ids): split where its last run of trained tokens begins."""
        trained = self.trained(i)
        stop = len(trained) - int(np.argmax(trained[::-1]))
        before = np.flatnonzero(~trained[:stop])
        start = int(before[-1]) + 1 if len(before) else 0
        tokens = self.tokens(i).tolist()
        return tokens[:start], tokens[start:stop]

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of each example's content hash, [n]: equal conversations have equal ones, whatever the tokenizer."""
        return self._hashes[self.index]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the examples: the cache's key and the choice from it."""
        choice = np.ascontiguousarray(self.index, dtype="<i8").tobytes()
        return hashlib.sha256(self.directory.name.encode() + choice).hexdigest()

    def select(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> SftDataset:
        """The examples at these positions (or where this mask is true), in this order."""
        return SftDataset(self.directory, self.files, self.index[chosen])

    def _span(self, i: int) -> slice:
        j = self.index[i]
        return slice(self._offsets[j], self._offsets[j + 1])

    def _map(self, name: str, dtype: np.dtype, n_tokens: int) -> NDArray:
        path = self.directory / name
        if path.stat().st_size != n_tokens * dtype.itemsize:
            raise DataError(f"{path}: the cached data is not whole; delete {self.directory} and run again")
        return np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,)).view(np.ndarray)


def read_again(files: Sequence[Path], wanted: Sequence[tuple[int, int]], parse: Callable[[Record], T]) -> list[T]:
    """The rows at these places (number of the file, row in it) as `parse` reads them, in one pass over the files."""
    found: dict[tuple[int, int], T] = {}
    for number in sorted({number for number, _ in wanted}):
        rows = {row for n, row in wanted if n == number}
        for record in read_records(files[number]):
            if record.row in rows:
                found[number, record.row] = parse(record)
            if record.row >= max(rows):
                break
    return [found[place] for place in wanted]


def build_dataset(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    max_truncated: float = 0.05,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> SftDataset:
    """Tokenise `source` (see formats.py), or open the cache of that.

    max_length: tokens; longer examples are left out, and are an error where they are more than the share
    `max_truncated`. workers: processes, 0 for one per core. cache_dir: default `data` in
    Arriero's cache (paths.py). Raises DataError, naming file and row, for rows that cannot be learned from.
    """
    console = console or notes()
    files = source_files(source)
    directory = tokenised(files, tokenizer, "", partial(encode_records, tokenizer), workers, cache_dir, console)
    dataset = SftDataset(directory, files)
    return dataset if max_length is None else leave_out_long(dataset, max_length, max_truncated, console)


def tokenised(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    kind: str,
    encode: Callable[[Sequence[Record]], EncodedRows],
    workers: int,
    cache_dir: str | Path | None,
    console: Console,
) -> Path:
    """The directory of the cache of these files, which is made where there is none.

    kind: what the rows are read as, with a number that goes up when the same rows would give other bytes.
    """
    directory = cache_directory(cache_dir) / cache_key(files, tokenizer, kind)
    if not directory.is_dir():
        write_cache(directory, files, encode_files(files, encode, workers, console))
    for file, unused in zip(files, json.loads((directory / "unused.json").read_text("utf-8")), strict=True):
        warn_of_unused(file, unused)  # each run says it, also one that finds all tokenised
    return directory


def build_splits(
    train: str | Path,
    validation: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_truncated: float = 0.05,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> tuple[SftDataset, SftDataset | None]:
    """Training and validation data; `validation` is a file, or a share of the training rows ("0": none).

    A share takes examples by their content's hash: the same ones whatever else is in the file, and equal
    conversations all on one side. From a file, conversations that are also in the validation file are left out
    of training.
    """
    console = console or notes()

    def build(source: str | Path) -> SftDataset:
        return build_dataset(
            source,
            tokenizer,
            max_length=max_length,
            max_truncated=max_truncated,
            workers=workers,
            cache_dir=cache_dir,
            console=console,
        )

    return splits(build, train, validation, console)


# Statistics


@dataclass(frozen=True)
class DataStats:
    """What a data set holds; lengths in tokens."""

    examples: int
    tokens: int
    trained_tokens: int
    trained_share: float
    length_percentiles: dict[str, int]
    answer_percentiles: dict[str, int]  # trained tokens of an example
    seq_len: int
    packed_rows: int
    packing_efficiency: float  # share of the packed rows' capacity that holds tokens

    def to_dict(self) -> dict:
        """As JSON keeps it."""
        return asdict(self)


def data_stats(dataset: SftDataset, seq_len: int) -> DataStats:
    """Lengths, mask and packing of the examples; those longer than `seq_len` are left out of the packing."""
    answers = np.array([dataset.trained(i).sum() for i in range(len(dataset))])
    fitting = dataset.lengths[dataset.lengths <= seq_len]
    rows = len(pack(fitting, seq_len, 0, 0))
    return DataStats(
        examples=len(dataset),
        tokens=int(dataset.lengths.sum()),
        trained_tokens=int(answers.sum()),
        trained_share=float(answers.sum() / dataset.lengths.sum()),
        length_percentiles=percentiles(dataset.lengths),
        answer_percentiles=percentiles(answers),
        seq_len=seq_len,
        packed_rows=rows,
        packing_efficiency=float(fitting.sum() / (rows * seq_len)) if rows else 0.0,
    )


def percentiles(values: NDArray) -> dict[str, int]:
    """Some of the percentiles of numbers, by name."""
    points = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: int(np.percentile(values, p, method="lower")) for name, p in points.items()}
