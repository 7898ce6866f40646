"""Writes token shards so that a run killed at any time can continue, with no document lost, repeated or half-written.

Documents are committed a part at a time: the files of a part are synced and renamed, then progress.json, which lists
the contents of all parts and the position to resume from, is replaced. What a killed run wrote after its last commit is
written again, with the same bytes. At the end the parts' indices are joined, every set gets its manifest, and
progress.json is marked complete.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.data.shards import FORMAT, MANIFEST, PROGRESS, SPLITS, source_directory
from arriero.errors import DataError
from arriero.io.files import LOCK, locked, put_in_place, replaced_file, sync, temporary_name, write_json
from arriero.io.handles import Appending
from arriero.io.reading import read_json
from arriero.tokenizer.base import Tokenizer

SetName = tuple[str, str]  # (split, source)


@dataclass(frozen=True)
class MarkedDocuments:
    """Consecutive documents of one set as ids, with the tokens that mark their ends."""

    tokens: NDArray[Any]  # all, end to end
    lengths: NDArray[np.int64]  # tokens of each
    text_bytes: NDArray[np.int64]  # UTF-8 bytes of each


@dataclass
class State:
    """progress.json: what was asked for, what is durable, and the position after it."""

    request: dict[str, Any]
    position: tuple[int, int] = (0, 0)
    parts: list[dict[str, dict[str, Any]]] = field(default_factory=list)  # by "split/source": its file and counts
    left_out: dict[str, int] = field(default_factory=dict)  # documents, by reason
    complete: bool = False


class ShardWriter:
    """Writes sets under `out`, beginning or going on; a context manager, for `out` is locked meanwhile.

    request: all that decides the bytes but the documents themselves; a run that goes on has to ask for the same.
    """

    def __init__(self, out: Path, tokenizer: Tokenizer, request: Mapping[str, Any], by_source: bool) -> None:
        self.out, self.tokenizer, self.by_source = out, tokenizer, by_source
        self._files = Appending()  # a part may have a file for each of a thousand sources
        self._open: dict[SetName, _SetPart] = {}
        self._left_out: dict[str, int] = {}
        self._position: tuple[int, int] | None = None
        self._request = dict(request)

    def __enter__(self) -> ShardWriter:
        begun = (self.out / PROGRESS).is_file()
        if not begun and self.out.is_dir() and any(path.name != LOCK for path in self.out.iterdir()):
            raise DataError(f"{self.out} holds something else; give another --out, or empty it")
        busy = DataError(f"{self.out}: another process is writing shards there; wait for it, or give another --out")
        with ExitStack() as stack:
            stack.enter_context(locked(self.out, busy))
            self.state = self._read_state() if begun else State(self._request)
            if not self.state.parts:
                self._clear()  # what a run was at before anything was durable
                self._save()
            for stray in self.out.glob("**/.*.tmp"):  # of a run that was killed
                stray.unlink()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for part in self._open.values():
            part.abandon()
        self._stack.close()

    def add(
        self, documents: Mapping[SetName, MarkedDocuments], left_out: Mapping[str, int], position: tuple[int, int]
    ) -> None:
        """Append documents; `position` is where reading goes on after them."""
        for name, encoded in documents.items():
            if name not in self._open:
                self._open[name] = _SetPart(self.directory(name), len(self.state.parts), self._files)
            self._open[name].add(encoded)
        for reason, n in left_out.items():
            self._left_out[reason] = self._left_out.get(reason, 0) + n
        self._position = position

    def commit(self) -> None:
        """Make what was added durable."""
        if self._position is None:
            return
        self.state.position = self._position
        for reason, n in self._left_out.items():
            self.state.left_out[reason] = self.state.left_out.get(reason, 0) + n
        self.state.parts.append({"/".join(name): part.commit() for name, part in self._open.items()})
        self._open, self._left_out, self._position = {}, {}, None
        self._save()

    def finish(self) -> None:
        """Save the tokenizer, join the parts' indices, write the manifests."""
        self._save_tokenizer()
        for name in sorted({name for part in self.state.parts for name in part}):
            split, _, source = name.partition("/")
            self._finish_set(split, source, [part[name] for part in self.state.parts if name in part])
        self.state.complete = True
        self._save()
        for index in self.out.glob("**/index-*.bin"):
            index.unlink()

    def discard(self) -> None:
        """Take away all that was written: it is of no use, and another try is to find the place empty."""
        self._clear()
        (self.out / PROGRESS).unlink()

    def directory(self, name: SetName) -> Path:
        """The directory of a set."""
        split, source = name
        return self.out / split / source_directory(source) if self.by_source else self.out / split

    def _clear(self) -> None:
        for split in SPLITS:
            shutil.rmtree(self.out / split, ignore_errors=True)

    def _save_tokenizer(self) -> None:
        if (self.out / "tokenizer").is_dir():
            return
        temporary = self.out / ".tokenizer"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self.tokenizer.save(temporary)
        for file in temporary.iterdir():
            sync(file)
        put_in_place(temporary, self.out / "tokenizer")

    def _finish_set(self, split: str, source: str, parts: list[dict[str, Any]]) -> None:
        directory, total = self.directory((split, source)), 0
        with (
            _HashedFile(directory / "offsets.bin", self._files) as offsets,
            _HashedFile(directory / "bytes.bin", self._files) as sizes,
        ):
            offsets.write(np.zeros(1, dtype="<i8").tobytes())
            for part in parts:
                index = np.fromfile(directory / part["name"].replace("tokens", "index"), dtype="<i8").reshape(-1, 2)
                offsets.write((total + np.cumsum(index[:, 0])).astype("<i8").tobytes())
                sizes.write(index[:, 1].astype("<u4").tobytes())
                total += part["n_tokens"]
            columns = [offsets.commit(), sizes.commit()]
        manifest = {
            "format": FORMAT,
            "split": split,
            "source": source,
            **{key: self.state.request[key] for key in ("tokenizer", "bos", "eos")},
            "vocab_size": self.tokenizer.vocab_size,
            **{key: sum(part[key] for part in parts) for key in ("n_documents", "n_tokens", "n_bytes")},
            "files": [*parts, *columns],
        }
        write_json(directory / MANIFEST, manifest)

    def _read_state(self) -> State:
        path = self.out / PROGRESS
        written = read_json(path, remedy=f"remove {self.out} and begin again", refusal=DataError)
        try:
            state = State(**written)
        except TypeError as error:
            raise DataError(f"{path}: not readable ({error}); remove {self.out} and begin again") from error
        if not state.parts:  # stopped before anything was durable: what was asked for may be mended
            return State(self._request)
        for what, asked in self._request.items():
            if (before := state.request.get(what)) != asked:
                raise DataError(
                    f"{self.out} was begun with {what} = {before!r}, now it is {asked!r}; "
                    "go on with what it was begun with, give another --out, or remove this one"
                )
        return state

    def _save(self) -> None:
        write_json(self.out / PROGRESS, asdict(self.state))


class _HashedFile:
    """A file that `commit` renames into place, returning its manifest entry; as a context it leaves no other file."""

    def __init__(self, path: Path, files: Appending) -> None:
        self._path, self._temporary, self._files = path, temporary_name(path), files
        self._hash, self._size = hashlib.sha256(), 0
        self.write(b"")  # an empty one is there too

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def write(self, data: bytes) -> None:
        self._files.write(self._temporary, data)
        self._hash.update(data)
        self._size += len(data)

    def commit(self) -> dict[str, Any]:
        self._files.close(self._temporary)
        put_in_place(self._temporary, self._path)
        return {"name": self._path.name, "size": self._size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Leave nothing behind, unless it is in place already."""
        with suppress(OSError):  # of a full disk, which has been reported
            self._files.close(self._temporary)
        self._temporary.unlink(missing_ok=True)


class _SetPart:
    """One set's documents in one part."""

    def __init__(self, directory: Path, number: int, files: Appending) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._tokens = _HashedFile(directory / f"tokens-{number:05d}.bin", files)
        self._index_path = directory / f"index-{number:05d}.bin"
        self._index: list[NDArray[np.int64]] = []

    def add(self, encoded: MarkedDocuments) -> None:
        self._tokens.write(encoded.tokens.tobytes())
        self._index.append(np.stack([encoded.lengths, encoded.text_bytes], axis=1))

    def commit(self) -> dict[str, Any]:
        """Put the files in place; returns the manifest's entry."""
        index = np.concatenate(self._index)
        with replaced_file(self._index_path) as path:
            path.write_bytes(index.astype("<i8").tobytes())
        n_tokens, n_bytes = (int(x) for x in index.sum(axis=0))
        counts = {"n_documents": len(index), "n_tokens": n_tokens, "n_bytes": n_bytes}
        return self._tokens.commit() | counts

    def abandon(self) -> None:
        self._tokens.abandon()
