"""What a teacher model says of the trained tokens of a data set: its k most probable tokens at each, kept on disk.

    DIRECTORY/            named by the hash of data, teacher, number type and k
        ids.bin           int32 [T, k]: the k most probable tokens, at the position of each trained token
        logq.bin          float32 [T, k + 1]: their log-probabilities, and that of all other tokens together

Written once, by a forward pass of the teacher over all rows; the student's epochs then cost no teacher, and the two
are never in memory together. Price: 8 k + 4 bytes of disk for each trained token (260 at k = 32), read through a memory
map.

T trained tokens of all examples, end to end in the order of the data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from arriero.checkpoint.digest import content_digest
from arriero.checkpoint.files import replaced_directory
from arriero.checkpoint.load import load_model, load_tokenizer_at
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.source import resolve
from arriero.data.batch import IGNORED, Batch, Row, collate, next_token_targets
from arriero.data.sft import SftDataset
from arriero.data.sft_cache import cache_directory
from arriero.data.sft_loader import SftLoader
from arriero.errors import ConfigError, DataError
from arriero.losses.distillation import CHUNK
from arriero.model.llama import Llama
from arriero.show.progress import progress
from arriero.tokenizer.base import Tokenizer

IDS, LOGQ = "teacher_ids", "teacher_logq"  # extras of a row
_TOKENS = 4096  # that the teacher reads at once, but for longer examples


class Teacher:
    """Opens what `teacher_of` wrote for `dataset`."""

    def __init__(self, directory: Path, dataset: SftDataset, k: int) -> None:
        counts = [int(dataset.trained(i)[1:].sum()) for i in range(len(dataset))]
        self._dataset, self._starts = dataset, np.concatenate([[0], np.cumsum(counts)])
        total = int(self._starts[-1])
        self._ids = _open(directory / "ids.bin", np.dtype(np.int32), (total, k))
        self._logq = _open(directory / "logq.bin", np.dtype(np.float32), (total, k + 1))

    def of(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Of example i with n tokens: ids [n, k] and log-probabilities [n, k + 1] at the position before each trained
        token, 0 elsewhere."""
        at, before = slice(self._starts[i], self._starts[i + 1]), np.flatnonzero(self._dataset.trained(i)[1:])
        n = len(self._dataset.tokens(i))
        ids, logq = (np.zeros((n, x.shape[1]), x.dtype) for x in (self._ids, self._logq))
        ids[before], logq[before] = self._ids[at], self._logq[at]
        return ids, logq

    @property
    def covered(self) -> float:
        """Mean probability of the k tokens, which the student's are compared with one by one."""
        return 1 - float(np.exp(self._logq[:, -1], dtype=np.float64).mean())


class TaughtRows:
    """The rows of a loader with what a teacher says of their tokens, as extras."""

    def __init__(self, loader: SftLoader, teacher: Teacher) -> None:
        self._loader, self._teacher = loader, teacher

    def row(self, index: int) -> Row:
        """Row `index` of the loader."""
        p = len(self._loader.prefix)
        each = [self._teacher.of(i) for i in self._loader.epochs.examples(index)]
        extras = {IDS: np.concatenate([ids[p:] for ids, _ in each]), LOGQ: np.concatenate([q[p:] for _, q in each])}
        return dataclasses.replace(self._loader.row(index), token_extras=extras)

    def collate(self, rows: Sequence[Row], pad_to: int | None = None) -> Batch:
        """As the loader's."""
        return self._loader.collate(rows, pad_to)


def teacher_of(
    name: str, dataset: SftDataset, student: Tokenizer, k: int, dtype: torch.dtype, console: Console
) -> Teacher:
    """What the model of that name says of `dataset`: from disk, where it is known already.

    Raises `ConfigError` where the teacher's ids are not the student's, or it has fewer than k tokens.
    """
    path = resolve_teacher(name)
    own = check_same_ids(name, path, student)
    key = hashlib.sha256(f"{dataset.fingerprint}\0{content_digest(path)}\0{k}\0{dtype}".encode()).hexdigest()[:40]
    directory = cache_directory(None) / f"teacher-{key}"
    if not directory.is_dir():
        model = load_model(path, dtype=dtype)
        check_rows(path, model.config.vocab_size, own)
        model.config.check_length(int(dataset.lengths.max()))
        if k > model.config.vocab_size:
            raise ConfigError(f"top_k is {k:,}; the teacher has {model.config.vocab_size:,} tokens")
        with progress(f"{name} reads {len(dataset):,} examples", len(dataset), console) as bar:
            _write(directory, _said(model, dataset, k, bar.reach))
    return Teacher(directory, dataset, k)


def resolve_teacher(name: str) -> Path:
    """The files of the teacher of that name. Raises `ConfigError` where there is no name."""
    if not name:
        raise ConfigError("teacher is missing; name one: --teacher MODEL")
    return resolve(name)


def check_same_ids(name: str, path: Path, student: Tokenizer) -> Tokenizer:
    """The teacher's tokenizer. Raises `ConfigError` where its ids are not the student's."""
    own = load_tokenizer_at(path)
    if not (own.holds(student) and student.holds(own)):
        raise ConfigError(
            f"teacher {name}: its tokenizer gives other ids than the model's, and probabilities are compared token by "
            "token; name a teacher of the same tokenizer"
        )
    return own


@torch.no_grad()
def _said(
    model: Llama, dataset: SftDataset, k: int, on_example: Callable[[int], None]
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    for group in _groups(dataset.lengths.tolist()):
        examples = [(dataset.tokens(i), dataset.trained(i)) for i in group]
        rows = [Row(t, next_token_targets(t, trained), np.array([len(t)])) for t, trained in examples]
        batch = collate(rows)
        hidden = model.model(batch.tokens, batch.layout)[batch.targets != IGNORED]
        for chunk in hidden.split(CHUNK):
            logq = model.head(chunk).float().log_softmax(1)
            top = logq.topk(k)
            rest = logq.scatter(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
            yield top.indices.int().numpy(), torch.cat((top.values, rest), 1).numpy()
        on_example(group.stop)


def _groups(lengths: Sequence[int]) -> Iterator[range]:
    """Consecutive examples that are read at once."""
    first = tokens = 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > _TOKENS:
            yield range(first, i)
            first, tokens = i, 0
        tokens += length
    yield range(first, len(lengths))


def _write(directory: Path, said: Iterable[tuple[NDArray[np.int32], NDArray[np.float32]]]) -> None:
    with (
        replaced_directory(directory) as temporary,
        open(temporary / "ids.bin", "wb") as ids,
        open(temporary / "logq.bin", "wb") as logq,
    ):
        for tokens, logs in said:
            ids.write(tokens.tobytes())
            logq.write(logs.tobytes())


def _open(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> NDArray:
    if path.stat().st_size != shape[0] * shape[1] * dtype.itemsize:
        raise DataError(f"{path}: what the teacher said is not whole; delete {path.parent} and run again")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape).view(np.ndarray)
