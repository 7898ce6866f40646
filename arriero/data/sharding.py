"""Text to token shards: `arriero shard`. Files are as `shards.py` describes them.

The reader hands chunks of documents to worker processes, which encode them; one writer puts the results into files in
the order of the documents. So the bytes are the same for any number of workers. Documents become durable a part at a
time (about `part_bytes` of text): a part's files are synced and renamed, then progress.json, which holds the position
after its last document, is replaced. Killed anywhere, even by SIGKILL or a power cut, the next run goes on from there:
nothing is lost, repeated or half written. The manifests come last.

Every document stands between the tokens that its tokenizer's family puts there (`document_marks`). Documents without
text are left out. Which are held out for validation is decided by a hash of the text: equal texts lie on one side.

Price: little but the encoding, whose speed and share are in docs/log.md; memory for a few chunks a worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from arriero.curate.document import Document
from arriero.curate.sources import Position, Reading, list_files, read_from
from arriero.data.files import replaced, write_text
from arriero.data.shards import FORMAT, MANIFEST, ONE_SOURCE, Shards, open_sources, token_type
from arriero.errors import DataError
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.parallel import DocumentEncoder

CHUNK = 2**20  # characters that a worker gets at once
PART = 2**28  # characters of text that become durable at once
PROGRESS = "progress.json"
TRAIN, VALIDATION = "train", "validation"

Stream = Callable[[Position], Iterator[tuple[Document, Position]]]  # documents after a position, each with its own


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
    """Tokenise the documents of the sources (`curate/sources.py` reads them) into `out`; go on where a run was stopped.

    validation: the share of documents to hold out, by a hash of their text, or a source of held-out documents, whose
    texts are then left out of training. by_source: a set for each `Document.source`, so that they can be weighted.
    workers: encoding processes, 0 for one a core. part_size: characters of text between two points to go on from.
    Returns {"train": {source: shards}, "validation": ...}. Raises DataError.
    """
    share, held_out_source = _validation(validation)
    files = list_files(sources)
    held_out_files = list_files([held_out_source]) if held_out_source is not None else []
    every = [*held_out_files, *files]
    reading = Reading(text_key)
    what = hashlib.sha256(json.dumps([[f.name, f.path.stat().st_size] for f in every]).encode()).hexdigest()
    plan = Plan(tokenizer, share, by_source, part_size, what, len(held_out_files))
    sizes = [f.path.stat().st_size for f in every]
    held_out = frozenset(text_hash(d.text) for d, _ in read_from(held_out_files, reading=reading))
    return _shard(lambda start: read_from(every, start, reading), plan, held_out, Path(out), workers, sizes, console)


def shard_documents(
    documents: Iterable[str | Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    validation: float = 0.01,
    by_source: bool = False,
    workers: int = 1,
    part_size: int = PART,
    console: Console | None = None,
) -> dict[str, dict[str, Shards]]:
    """As `shard_sources`, for documents or texts from Python; stopped and called again, it passes over those done."""

    def stream(start: Position) -> Iterator[tuple[Document, Position]]:
        for i, document in enumerate(documents):
            if i >= start.row:
                whole = Document(document, str(i)) if isinstance(document, str) else document
                yield whole, Position(0, i + 1)

    plan = Plan(tokenizer, validation, by_source, part_size, "documents", 0)
    return _shard(stream, plan, frozenset(), Path(out), workers, [0], console)


@dataclass(frozen=True)
class Plan:
    """What decides the bytes of the result, for given documents."""

    tokenizer: Tokenizer
    validation: float
    by_source: bool
    part_size: int
    sources: str  # SHA-256 of the files' names and sizes
    n_held_out_files: int  # first files of the stream, which are validation whole

    def request(self) -> dict[str, Any]:
        """As progress.json keeps it, to be compared when a run goes on."""
        bos, eos = document_marks(self.tokenizer)
        own = {"tokenizer": self.tokenizer.fingerprint, "bos": bos, "eos": eos, "format": FORMAT}
        return own | {name: getattr(self, name) for name in ("validation", "by_source", "part_size", "sources")}


def _validation(validation: str | float) -> tuple[float, str | None]:
    """(share, "") or (0, source)."""
    try:
        share = float(validation)
    except ValueError:
        return 0.0, str(validation)
    if not 0 <= share < 1:
        raise DataError(f"validation is {validation}; give a share of the documents from 0 to below 1, or a source")
    return share, None


def text_hash(text: str) -> int:
    """64 bits of a text's SHA-256: which side of the split it falls on."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")


# Encoding


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents on their way to a worker; `position` is that after the last, which may end a part."""

    texts: list[str]
    sources: list[str]
    held_out: bool
    size: int  # characters
    position: Position
    ends_part: bool


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents of one set as ids, marks included."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]  # tokens of each
    text_bytes: NDArray[np.uint32]  # UTF-8 bytes of each


Result = tuple[dict[tuple[str, str], Encoded], dict[str, int]]  # by (split, source); counts of what was left out


class Encoder:
    """Encodes chunks; one in each worker process."""

    def __init__(self, plan: Plan, held_out: frozenset[int]) -> None:
        self.plan, self.held_out = plan, held_out
        self.encoder = DocumentEncoder(plan.tokenizer, threads=1)
        self.marks = document_marks(plan.tokenizer)
        self.dtype = token_type(plan.tokenizer.vocab_size)
        self.threshold = int(plan.validation * 2**64)

    def __call__(self, chunk: Chunk) -> Result:
        chosen: dict[tuple[str, str], list[str]] = {}
        left_out = {"empty": 0, "held_out": 0}
        for text, source in zip(chunk.texts, chunk.sources, strict=True):
            hash_ = text_hash(text)
            if not text.strip():
                left_out["empty"] += 1
            elif not chunk.held_out and hash_ in self.held_out:
                left_out["held_out"] += 1
            else:
                split = VALIDATION if chunk.held_out or hash_ < self.threshold else TRAIN
                name = source if self.plan.by_source and source else ONE_SOURCE
                chosen.setdefault((split, name), []).append(text)
        return {key: self._encode(texts) for key, texts in chosen.items()}, left_out

    def _encode(self, texts: list[str]) -> Encoded:
        encoded = self.encoder.encode(texts)
        bos, eos = ([] if mark is None else [mark] for mark in self.marks)
        lengths = np.diff(encoded.offsets) + len(bos) + len(eos)
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]), dtype=self.dtype)
        plain = np.ones(len(tokens), dtype=bool)
        for mark, places in ((bos, ends - lengths), (eos, ends - 1)):
            if mark:
                tokens[places], plain[places] = mark[0], False
        tokens[plain] = encoded.ids
        sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
        return Encoded(tokens, lengths, np.array(sizes, dtype=np.uint32))


_encoder: Encoder | None = None  # one for each worker process: sending it takes longer than a chunk


def _start_worker(plan: Plan, held_out: frozenset[int]) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(plan, held_out)


def _end_with_parent() -> None:
    """A parent killed by SIGKILL cannot end its workers, which would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Result:
    assert _encoder is not None
    return _encoder(chunk)


def _encode_all(
    chunks: Iterator[Chunk], plan: Plan, held_out: frozenset[int], workers: int
) -> Iterator[tuple[Chunk, Result]]:
    """Each chunk with its result, in order; a few chunks for each worker are under way."""
    if workers == 1:
        encoder = Encoder(plan, held_out)
        yield from ((chunk, encoder(chunk)) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (plan, held_out))
    waiting: deque[tuple[Chunk, Future[Result]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(waiting) > 3 * workers:
                chunk, future = waiting.popleft()
                yield chunk, future.result()
        while waiting:
            chunk, future = waiting.popleft()
            yield chunk, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} tokenising processes died: out of memory, or started from a script whose main part is "
            'not under `if __name__ == "__main__":`; put it there, or set workers to 1, and run again to go on'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# Writing


@dataclass
class State:
    """progress.json: what is durable, and the position after it."""

    request: dict[str, Any]
    position: list[int] = field(default_factory=lambda: [0, 0])
    parts: list[dict[str, Any]] = field(default_factory=list)  # by "split/source": counts and hash of its files
    left_out: dict[str, int] = field(default_factory=lambda: {"empty": 0, "held_out": 0})
    characters: int = 0
    complete: bool = False


class SetWriter:
    """The files of one set in one part, under temporary names until `commit`."""

    def __init__(self, directory: Path, part: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.index_path = directory / f"tokens-{part:05d}.bin", directory / f"index-{part:05d}.bin"
        self._files = ExitStack()
        temporary = self._files.enter_context(replaced(self.path))
        self._file = self._files.enter_context(temporary.open("wb"))
        self._hash = hashlib.sha256()
        self._index: list[NDArray[np.int64]] = []

    def add(self, encoded: Encoded) -> None:
        """Append documents."""
        data = encoded.tokens.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._index.append(np.stack([encoded.lengths, encoded.text_bytes.astype(np.int64)], axis=1))

    def commit(self) -> dict[str, Any]:
        """Put the files in place; returns what the manifest says of the tokens."""
        index = np.concatenate(self._index).astype("<i8")
        with replaced(self.index_path) as path:
            path.write_bytes(index.tobytes())
        size = self._file.tell()
        self._files.close()
        n_tokens, n_bytes = (int(x) for x in index.sum(axis=0))
        counts = {"n_documents": len(index), "n_tokens": n_tokens, "n_bytes": n_bytes}
        return {"name": self.path.name, "size": size, "sha256": self._hash.hexdigest(), **counts}


class Writer:
    """All sets under `out`, part by part, and progress.json."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        self.state = self._begin(State(plan.request()))
        self._open: dict[tuple[str, str], SetWriter] = {}

    def _begin(self, fresh: State) -> State:
        """Claim `out`, or take up what a run before left there."""
        path = self.out / PROGRESS
        if not path.is_file():
            if self.out.exists() and any(self.out.iterdir()):
                raise DataError(f"{self.out} exists and holds something else; give another --out, or empty it")
            self.out.mkdir(parents=True, exist_ok=True)
            _write_json(path, asdict(fresh))
            return fresh
        state = State(**json.loads(path.read_text(encoding="utf-8")))
        for name, asked in fresh.request.items():
            if state.request.get(name) != asked:
                began = state.request.get(name)
                raise DataError(
                    f"{self.out} was begun with {_WORDS.get(name, name)} {began!r}, now it is {asked!r}; "
                    "go on as it was begun, or give another --out"
                )
        for stray in self.out.glob("*/**/.*.tmp"):  # of a run that was killed
            stray.unlink()
        return state

    def add(self, chunk: Chunk, result: Result) -> None:
        """Append a chunk's documents, and make the part durable where the chunk ends it."""
        encoded, left_out = result
        for key, documents in encoded.items():
            if key not in self._open:
                self._open[key] = SetWriter(self.directory(*key), len(self.state.parts))
            self._open[key].add(documents)
        for reason, n in left_out.items():
            self.state.left_out[reason] += n
        self.state.characters += chunk.size
        self.state.position = list(chunk.position)
        if chunk.ends_part:
            self.commit()

    def commit(self) -> None:
        """Make what was added durable."""
        if not self._open:
            return
        self.state.parts.append({"/".join(key): writer.commit() for key, writer in self._open.items()})
        self._open = {}
        self._save()

    def directory(self, split: str, source: str) -> Path:
        """Where a set lies; any character may be in a source's name, so it is percent-encoded."""
        return (
            self.out / split / quote(source, safe=" ").replace(".", "%2E") if self.plan.by_source else self.out / split
        )

    def finish(self) -> None:
        """Join the parts' indices and write the manifests."""
        names = sorted({key for part in self.state.parts for key in part})
        for split in {TRAIN} | ({VALIDATION} if self.plan.validation or self.plan.n_held_out_files else set()):
            if not any(name.startswith(split + "/") for name in names):
                raise DataError(
                    f"{self.out}: none of the documents went to {split} (validation is {self.plan.validation}); "
                    "give more documents, or another share"
                )
        if not (self.out / "tokenizer").is_dir():
            with TemporaryDirectory(dir=self.out, prefix=".tokenizer-") as directory:
                self.plan.tokenizer.save(directory)
                os.rename(directory, self.out / "tokenizer")
                Path(directory).mkdir()  # for the context to remove
        for name in names:
            self._finish_set(name)
        self.state.complete = True
        self._save()
        for index in self.out.glob("*/**/index-*.bin"):
            index.unlink()

    def _finish_set(self, name: str) -> None:
        split, _, source = name.partition("/")
        directory = self.directory(split, source)
        parts = [part[name] for part in self.state.parts if name in part]
        columns = {"offsets.bin": hashlib.sha256(), "bytes.bin": hashlib.sha256()}
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(open(stack.enter_context(replaced(directory / name)), "wb"))
                for name in columns
            }

            def write(name: str, values: NDArray[Any]) -> None:
                files[name].write(values.tobytes())
                columns[name].update(values.tobytes())

            write("offsets.bin", np.zeros(1, dtype="<i8"))
            n_tokens = 0
            for part in parts:
                index = np.fromfile(directory / part["name"].replace("tokens", "index"), dtype="<i8").reshape(-1, 2)
                write("offsets.bin", (n_tokens + np.cumsum(index[:, 0])).astype("<i8"))
                write("bytes.bin", index[:, 1].astype("<u4"))
                n_tokens += part["n_tokens"]
            sizes = {name: file.tell() for name, file in files.items()}
        joined = [{"name": name, "size": sizes[name], "sha256": columns[name].hexdigest()} for name in columns]
        request = self.state.request
        manifest = {
            "format": FORMAT,
            "split": split,
            "source": source,
            **{key: request[key] for key in ("tokenizer", "bos", "eos")},
            "vocab_size": self.plan.tokenizer.vocab_size,
            "dtype": {"<u2": "uint16", "<u4": "uint32"}[token_type(self.plan.tokenizer.vocab_size)],
            **{key: sum(part[key] for part in parts) for key in ("n_documents", "n_tokens", "n_bytes")},
            "files": [*parts, *joined],
        }
        _write_json(directory / MANIFEST, manifest)

    def _save(self) -> None:
        _write_json(self.out / PROGRESS, asdict(self.state))


_WORDS = {
    "tokenizer": "the tokenizer",
    "bos": "the token before documents",
    "eos": "the token after documents",
    "validation": "--validation",
    "by_source": "--by-source",
    "part_size": "part_size",
    "sources": "files whose names and sizes have the hash",
}


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


# The whole


def _shard(
    stream: Stream,
    plan: Plan,
    held_out: frozenset[int],
    out: Path,
    workers: int,
    sizes: Sequence[int],
    console: Console | None,
) -> dict[str, dict[str, Shards]]:
    workers = workers or os.cpu_count() or 1
    writer = Writer(out, plan)
    if not writer.state.complete:
        start = Position(*writer.state.position)
        chunks = _chunks(stream(start), plan)
        with _progress(console or Console(stderr=True)) as progress:
            bar = progress.add_task("sharding", total=sum(sizes), rate=0.0)
            begun = writer.state.characters
            for chunk, result in _encode_all(chunks, plan, held_out, workers):
                writer.add(chunk, result)
                rate = (writer.state.characters - begun) / (progress.tasks[bar].elapsed or 1e-9) / 1e6
                progress.update(bar, completed=sum(sizes[: chunk.position.file]), rate=rate)
            writer.commit()
        writer.finish()
    return {split: open_sources(out / split) for split in (TRAIN, VALIDATION) if (out / split).is_dir()}


def _chunks(documents: Iterator[tuple[Document, Position]], plan: Plan) -> Iterator[Chunk]:
    """Group documents; a part ends with the chunk that fills it, wherever the run began."""
    texts: list[str] = []
    sources: list[str] = []
    size = part = 0
    held_out = False
    position = Position()
    for document, after in documents:
        now_held_out = after.file < plan.n_held_out_files
        if texts and (size >= CHUNK or now_held_out != held_out):
            part += size
            ends_part = part >= plan.part_size
            yield Chunk(texts, sources, held_out, size, position, ends_part)
            texts, sources, size, part = [], [], 0, 0 if ends_part else part
        held_out, position = now_held_out, after
        texts.append(document.text)
        sources.append(document.source)
        size += len(document.text)
    if texts:
        yield Chunk(texts, sources, held_out, size, position, False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]:.1f} MB/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
