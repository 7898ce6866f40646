"""Token shards: documents as ids in flat files that are memory-mapped, with a manifest that says what is in them.

    DIR/tokenizer/             the tokenizer, in Hugging Face's layout
    DIR/train/                 one set of shards; with sources apart: DIR/train/SOURCE/
        manifest.json          counts, tokenizer's hash, name, size and SHA-256 of every file
        tokens-00000.bin ...   ids end to end, uint16 (vocabularies up to 65,536) or uint32, little-endian
        offsets.bin            int64 [n + 1]: document i is tokens offsets[i] to offsets[i + 1], counted over all files
        bytes.bin              uint32 [n]: UTF-8 bytes of each document's text, for bits per byte
    DIR/validation/            likewise, held out

A document never spans two files. A set with a manifest.json is complete, since that is written last (`sharding.py`).
The fingerprint is a hash of the manifest and so, through its hashes, of every byte; a run that resumes compares it.
Price: 2 or 4 bytes of disk per token and 12 per document. Opening a set reads the manifest only; the processes of a
machine share memory-mapped pages; the number of open files is bounded, however many sets there are (`io/handles.py`).

n documents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from arriero.errors import DataError
from arriero.io.handles import MappedArray
from arriero.io.paths import as_path, files_below, hint
from arriero.io.reading import read_json, reading
from arriero.tokenizer import load_tokenizer

FORMAT = "arriero-shards-1"
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # of `arriero shard`: what is in all sets of a directory
DEVICE = re.compile("(?i)con|prn|aux|nul|com[0-9]|lpt[0-9]")  # no file's name on Windows
ONE_SOURCE = "documents"  # what the only source of a set without sources is called
SPLITS = TRAIN, VALIDATION = "train", "validation"
MAX_UINT16 = 2**16

AGAIN = "copy the set again, whole, or make it anew"

IntArray = NDArray[np.int64]


class Shards:
    """One set of documents, opened; see the module for the files. `source` is its name in a mixture."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = as_path(directory)
        self.manifest = read_manifest(self.directory)
        m = self.manifest
        self.source: str = m["source"]
        self.n_documents, self.n_tokens, self.n_bytes = (int(m[k]) for k in ("n_documents", "n_tokens", "n_bytes"))
        self.vocab_size: int = m["vocab_size"]
        for file in m["files"]:
            self._check_size(file)
        self._offsets = self._map("offsets.bin", "<i8", self.n_documents + 1)
        self._text_bytes = self._map("bytes.bin", "<u4", self.n_documents)
        parts = [file for file in m["files"] if "n_tokens" in file]
        self._parts = [self._map(part["name"], token_type(self.vocab_size), part["n_tokens"]) for part in parts]
        self._starts = np.cumsum([0, *(part["n_tokens"] for part in parts)])
        ends = [int(self.offsets[i]) for i in (0, -1)]
        if [*ends, int(self._starts[-1])] != [0, self.n_tokens, self.n_tokens]:
            raise DataError(
                f"{self.directory}: offsets.bin goes from token {ends[0]:,} to {ends[1]:,}, the files hold "
                f"{int(self._starts[-1]):,} tokens, and {MANIFEST} says {self.n_tokens:,}; {AGAIN}"
            )

    def __len__(self) -> int:
        return self.n_documents

    @property
    def offsets(self) -> IntArray:
        """Where each document begins among the tokens of all files, and where the last ends, [n + 1]."""
        return self._offsets.array()

    @property
    def text_bytes(self) -> NDArray[np.uint32]:
        """UTF-8 bytes of each document's text, [n]."""
        return self._text_bytes.array()

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Ids start to stop of document i, all of them by default; a view of the file."""
        offsets = self.offsets
        first, last = int(offsets[i]), int(offsets[i + 1])
        part = int(np.searchsorted(self._starts, first, side="right")) - 1
        if not 0 <= first <= last <= self.n_tokens or (last > first and last > self._starts[part + 1]):
            raise DataError(
                f"{self.directory}: document {i} is said to be tokens {first:,} to {last:,}, which is no part of one "
                f"file; offsets.bin is damaged (arriero data verify {self.directory}): {AGAIN}"
            )
        if first == last:
            return np.zeros(0, dtype=token_type(self.vocab_size))
        base = first - int(self._starts[part])
        stop = last - first if stop is None else min(stop, last - first)
        ids = self._parts[part].array()[base + start : base + stop]
        if len(ids) and ids.max() >= self.vocab_size:
            raise DataError(
                f"{self.directory}: document {i} has the id {ids.max()}, of a vocabulary of {self.vocab_size}; the "
                f"files are damaged (arriero data verify {self.directory}): {AGAIN}"
            )
        return ids

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens of every document, [n]; for some of them, `lengths_of` needs no memory for all."""
        return np.diff(self.offsets)

    def lengths_of(self, documents: IntArray) -> IntArray:
        """Tokens of these documents."""
        offsets = self.offsets
        return offsets[documents + 1] - offsets[documents]

    @property
    def n_predicted(self) -> int:
        """Tokens that are ever predicted: all but the first of each document."""
        return self.n_tokens - self.n_documents

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which holds that of every file."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer that made the ids was saved."""
        for parent in self.directory.absolute().parents:
            if (parent / "tokenizer").is_dir():
                return parent / "tokenizer"
        raise DataError(
            f"{self.directory}: no directory 'tokenizer' above it; keep the set where `arriero shard` put it, "
            "or put the tokenizer's directory beside it again"
        )

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file["size"] for file in self.manifest["files"])

    def verify(self, progress: Callable[[int], None] = lambda size: None) -> None:
        """Read every byte and compare the SHA-256; raises DataError for the first file that differs.

        Also where manifest and files disagree in what is counted. progress: called with the bytes of each file read.
        """
        for file in self.manifest["files"]:
            path = self.directory / file["name"]
            with open(path, "rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != file["sha256"]:
                raise DataError(
                    f"{path}: its SHA-256 is {found[:16]}..., the manifest says {file['sha256'][:16]}...; "
                    "the file has changed since it was written: copy it again, or make the shards anew"
                )
            progress(file["size"])
        lengths, n_bytes = self.lengths, int(self.text_bytes.sum(dtype=np.uint64))
        if (lengths < 0).any() or n_bytes != self.n_bytes:
            raise DataError(
                f"{self.directory}: {MANIFEST} says {self.n_bytes:,} bytes of text, bytes.bin {n_bytes:,}, and "
                f"{int((lengths < 0).sum()):,} documents end before they begin; {AGAIN}"
            )

    def _check_size(self, file: Mapping[str, Any]) -> None:
        path = self.directory / file["name"]
        with reading(path, remedy=AGAIN, refusal=DataError):  # a name may be longer than a file's can be
            size = path.stat().st_size if path.is_file() else None
        if size != file["size"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise DataError(f"{path} {found}, the manifest says {file['size']:,} bytes; {AGAIN}")

    def _map(self, name: str, dtype: str, n: int) -> MappedArray:
        try:
            return MappedArray(self.directory / name, dtype, n)
        except (DataError, FileNotFoundError) as error:
            raise DataError(
                f"{self.directory / name}: it does not hold the {n:,} numbers of {MANIFEST} ({error}); {AGAIN}"
            ) from error


def source_directory(source: str) -> str:
    """The name of the directory of a source's set, on any file system.

    A source's name may have any character, so it is percent-encoded. One that would be too long for a file's name (255
    bytes), or names a device, becomes its beginning, a "+", which occurs in no encoded name, and a hash.
    """
    name = quote(source, safe=" ", errors="surrogatepass").replace(".", "%2E")
    if name.endswith(" "):
        name = f"{name[:-1]}%20"
    if len(name) <= 200 and not DEVICE.fullmatch(name):
        return name
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{re.sub('%.?$', '', name[:120])}+{digest[:32]}"


def _source_of(shards: Shards) -> str:
    """What a set's source is called: as its directory, which may have been renamed; a name too long by its manifest."""
    directory = shards.directory.name
    return shards.source if directory == source_directory(shards.source) else unquote(directory)


def open_sources(directory: str | Path) -> dict[str, Shards]:
    """The sets in `directory` by the name of the source, which is that of the set's own directory; sorted.

    One, by the name that its manifest has ("documents" where sources were not kept apart), if `directory` is a set.
    Raises DataError where there is none, or where they were made with different tokenizers.
    """
    directory = as_path(directory)
    if (directory / MANIFEST).is_file():
        one = Shards(directory)
        return {one.source: one}
    sets = (Shards(path.parent) for path in directory.glob(f"*/{MANIFEST}"))
    found = {_source_of(shards): shards for shards in sets}
    if not found:
        inner = " or ".join(str(directory / split) for split in SPLITS if holds_shards(directory / split))
        remedy = f"did you mean {inner}?" if inner else "`arriero shard` makes them; if it was stopped, run it again"
        raise DataError(f"{directory}: no token shards here (no {MANIFEST}); {remedy}{_absent(directory)}")
    by_name = dict(sorted(found.items()))
    first, *others = by_name.values()
    for other in others:
        if other.manifest["tokenizer"] != first.manifest["tokenizer"]:
            raise DataError(
                f"{first.directory} and {other.directory} were made with different tokenizers; "
                "shard both with the same one"
            )
    return by_name


def open_splits(train: str | Path, validation: str | Path = "") -> tuple[dict[str, Shards], dict[str, Shards]]:
    """The sets to train on, and those to validate on, of which there may be none; each by the name of its source.

    train: what `arriero shard` wrote, which may hold both, or any directory of sets. validation: likewise, to take the
    place of what was held out beside `train`. Raises DataError where they are not all of one tokenizer.
    """
    directory = _split_directory(as_path(train), TRAIN)
    sources = open_sources(directory)
    if len(splits := {shards.manifest["split"] for shards in sources.values()}) > 1:
        raise DataError(
            f"{directory}: sets of {' and '.join(sorted(splits))} side by side, and no directory 'tokenizer' as "
            "`arriero shard` left it; put that back, or train on one of them"
        )
    if validation:
        held_out = open_sources(_split_directory(as_path(validation), VALIDATION))
    else:
        held_out = _held_out_beside(directory)
    if not held_out:
        return sources, {}
    learned = {shards.fingerprint: shards for shards in sources.values()}
    for shards in held_out.values():
        if shards.fingerprint in learned:
            raise DataError(
                f"{shards.directory}, to validate on, is {learned[shards.fingerprint].directory}, which is trained on; "
                "give other documents to validate on, or shard with --validation 0.01 to hold some out"
            )
    first, other = (next(iter(sets.values())) for sets in (sources, held_out))
    if first.manifest["tokenizer"] != other.manifest["tokenizer"]:
        raise DataError(
            f"{other.directory}, to validate on, was made with another tokenizer than {first.directory}; "
            "shard both with the same one"
        )
    return sources, held_out


def _split_directory(directory: Path, split: str) -> Path:
    """The directory of `split` in what `arriero shard` wrote, which has a tokenizer; else `directory` itself."""
    inner = directory / split
    return inner if (directory / "tokenizer").is_dir() and holds_shards(inner) else directory


def _held_out_beside(train: Path) -> dict[str, Shards]:
    """The sets of a directory "validation" beside "train", unless both are sources of those names."""
    train = train.absolute()  # of ".", too
    if train.name != TRAIN or not holds_shards(train.parent / VALIDATION):
        return {}
    found = open_sources(train.parent / VALIDATION)
    return found if all(shards.manifest["split"] == VALIDATION for shards in found.values()) else {}


def holds_shards(directory: Path) -> bool:
    """Whether a set is in `directory` or one level below; an interrupted `arriero shard` leaves none."""
    return (directory / MANIFEST).is_file() or any(directory.glob(f"*/{MANIFEST}"))


def find_sets(directory: str | Path) -> list[Shards]:
    """Every set at `directory` and below it, training and validation alike; raises DataError where there is none.

    Also where one that progress.json lists is missing.
    """
    directory = as_path(directory)
    files = files_below(directory) if directory.is_dir() else []
    found = [Shards(path.parent) for path in files if path.name == MANIFEST]
    if not found:
        raise DataError(
            f"{directory}: no token shards here (no {MANIFEST}); `arriero shard` makes them{_absent(directory)}"
        )
    there = {f"{shards.manifest['split']}/{shards.source}" for shards in found}
    if missing := sorted(_written(directory / PROGRESS) - there):
        raise DataError(f"{directory}: the set {missing[0]}, of which {PROGRESS} tells, is missing; copy it again")
    return found


def _written(progress: Path) -> set[str]:
    """The sets, as "split/source", that progress.json lists; none where there is no such file."""
    if not progress.is_file():
        return set()
    parts = read_json(progress, remedy="copy it again", refusal=DataError).get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise DataError(f"{progress}: damaged ('parts' is no list of objects); copy it again")
    return {name for part in parts for name in part}


def verify_tokenizer(sets: Iterable[Shards]) -> None:
    """Raise DataError where the tokenizer in a directory above a set is not the one that made it."""
    fingerprint = cache(lambda directory: load_tokenizer(directory).fingerprint)
    for shards in sets:
        directory = shards.tokenizer_directory
        if fingerprint(directory) != shards.manifest["tokenizer"]:
            raise DataError(f"{directory}: not the tokenizer that made {shards.directory}; copy it again")


def _absent(directory: Path) -> str:
    """What to add to a refusal where the directory itself is not there."""
    return "" if directory.exists() else hint(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a set; raises DataError where there is none that this version reads."""
    path = directory / MANIFEST
    if not path.exists():
        raise DataError(
            f"{directory}: no token shards here (no {MANIFEST}); `arriero shard` makes them, "
            f"and if it was stopped, running it again goes on where it was{_absent(directory)}"
        )
    manifest = read_json(path, remedy=AGAIN, refusal=DataError)
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        raise DataError(f"{path}: its format is {found!r:.60}, this version reads {FORMAT!r}; make the shards anew")
    if not _is_whole(manifest):
        raise DataError(f"{path}: damaged, some of what it has to say is missing; copy the set again, whole")
    return manifest


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has all entries that `Shards` needs."""
    kinds = {
        **dict.fromkeys(("split", "source", "tokenizer"), str),
        **dict.fromkeys(("vocab_size", "n_documents", "n_tokens", "n_bytes"), int),
        "files": list,
    }
    files = {"name": str, "size": int, "sha256": str}
    return _has(manifest, kinds) and all(
        isinstance(file, dict)
        and _has(file, files | ({"n_tokens": int} if "n_tokens" in file else {}))
        and re.fullmatch(r"[\w-]+(\.[\w-]+)*", file["name"])  # beside the manifest, and nowhere else
        for file in manifest["files"]
    )


def _has(entries: Mapping[str, Any], kinds: Mapping[str, type]) -> bool:
    """Whether each entry is there and of its kind; numbers count something that fits on a disk."""
    values = [(entries.get(key), kind) for key, kind in kinds.items()]
    return all(type(value) is kind and (not isinstance(value, int) or 0 <= value < 2**63) for value, kind in values)


def token_type(vocab_size: int) -> str:
    """The smallest of the two number types that holds every id."""
    return "<u2" if vocab_size <= MAX_UINT16 else "<u4"


def fingerprints(sources: Mapping[str, Shards], held_out: Mapping[str, Shards]) -> dict[str, str]:
    """Fingerprints of the sets to train and to validate on, by a name for error messages."""
    of_training = {f"source {name!r}": shards.fingerprint for name, shards in sources.items()}
    return of_training | {f"validation source {name!r}": shards.fingerprint for name, shards in held_out.items()}
