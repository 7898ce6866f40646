"""Runs a curation: raw documents to a curated directory, with the same bytes for any number of workers and any crash.

    sources --read--> parts --stage--> parts --stage--> parts --> shards, manifest.json, report.html

The sources are divided into units (some small files, or one large one), and a unit's documents into parts of `part_mb`
of text; after that a part is the unit of work. A stage runs each part through the steps up to the next corpus step, for
which it also writes the keys; these are reduced to decisions (steps/corpus.py), which the next stage applies.
This module decides which tasks there are; tasks.py executes them, in any process. The result for a part depends on the
part and the decisions only.

Every file appears whole, by a rename, and a part's record (.json) appears last: a part with a record is complete, and
after a crash the remaining ones are done. Reading a large file resumes after its last part. plan.json (plan.py) holds
everything that the bytes depend on; a run with another plan is refused. The work directory takes about the size of the
compressed text, twice that while a stage runs.

Memory: a worker holds a batch (2 million characters, or one larger document) and its arrays, 0.25 GB in all; the parent
0.14 GB (docs/curation.md has what was measured).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from arriero import settings
from arriero.curate.config import CurateConfig, stages
from arriero.curate.executor import Executor, open_executor
from arriero.curate.parts import read_json
from arriero.curate.plan import plan_of, refuse_other_plan
from arriero.curate.sources import KIND, MANIFEST, PLAN, WORK, SourceFile, is_curation, list_files
from arriero.curate.stats import Json, add, best_examples
from arriero.curate.steps.corpus import KeyFile
from arriero.curate.tasks import ERRORS_SHOWN, MB, decision_path, finish_shard, read_unit, reduce_range, take_stage
from arriero.errors import ConfigError
from arriero.io.files import LOCK, locked, write_json, write_jsonl, write_text
from arriero.show.progress import progress
from arriero.show.terminal import notes

FORMAT = 1  # of the work directory and manifest


def curate(config: CurateConfig, console: Console | None = None) -> Json:
    """Curate the sources into `config.out`, or resume an earlier run of the same plan; returns the manifest."""
    console = console or notes()
    if not config.sources:
        raise ConfigError("no sources; give files, directories, 'stdlib' or Hub data set ids")
    if not config.out:
        raise ConfigError("no output directory; give one with --out DIR")
    out = Path(config.out)
    passed_over: Counter[str] = Counter()
    files = [file for file in list_files(config.sources, passed_over) if not is_below(file.path, out)]
    if not files:
        raise ConfigError(f"all sources lie in {out}, where the result goes; give another --out")
    if passed_over:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.most_common(10))
        console.print(f"passed over in directories: {kinds}", highlight=False, markup=False)
    refuse_what_is_not_ours(out)
    busy = ConfigError(f"{out} is in use by another `arriero curate`; wait for it, or give another --out")
    with locked(out, busy):
        plan = plan_of(config, files)
        if (out / MANIFEST).exists():
            manifest = read_json(out / MANIFEST)
            refuse_other_plan(out, manifest["plan"], plan)
            refuse_what_is_lost(out, manifest)
            shutil.rmtree(out / WORK, ignore_errors=True)
            return manifest
        work = out / WORK
        if any(path.name != PLAN for path in work.rglob("*.json")):  # some work is done
            refuse_other_plan(out, read_json(work / PLAN), plan)
        else:
            shutil.rmtree(work, ignore_errors=True)
        write_json(work / PLAN, plan)
        with open_executor(config.workers, config.ray) as executor:
            return CurationRun(config, out, plan, executor, console).all(files)


class CurationRun:
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
        config = replace(self.config, workers=0, ray="")  # who works does not matter, nor where
        write_report(self.out, manifest, examples, settings.to_toml(replace(config, out=""), "curate"))
        if "decontaminate" in self.config.steps:
            write_jsonl(self.out / "decontamination.jsonl", (hit for record in records for hit in record["hits"]))
        write_text(self.out / "config.toml", settings.to_toml(config, "curate"))
        for stray in self.out.glob(".*.tmp"):  # of a killed run's shards
            stray.unlink()
        write_json(self.out / MANIFEST, manifest)
        shutil.rmtree(self.work)
        return manifest

    def _directory(self, number: int) -> Path:
        """The directory of a stage's parts; stage -1 is what was read from the sources."""
        return self.work / ("read" if number < 0 else f"stage-{number:02d}")

    def _read(self, files: Sequence[SourceFile]) -> Json:
        """Read the sources into parts; returns what they hold together."""
        directory, summary = self._directory(-1), self.work / "read.json"
        if not summary.exists():
            units = cut(files, int(self.config.part_mb * MB))
            tasks = [(self.config, directory, number, unit) for number, unit in enumerate(units)]
            weights = [sum(file.path.stat().st_size for file in unit) for unit in units]
            self._each("reading", read_unit, tasks, weights, lambda: parts_in(directory))
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
        total: Json = {
            "parts": [],
            "counts": {},
            "steps": {},
            "examples": {},
            "errors": {},
            "passed_over": {},
            "hits": [],
        }
        for name in names:
            record = read_json(directory / f"{name}.json")
            total["parts"].append({key: record[key] for key in ("name", "documents", "characters", "bytes", "keys")})
            for key in ("counts", "steps", "errors", "passed_over"):
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
        unreached = {"seen": 0, "dropped": {}, "changed": 0, "characters_removed": 0}
        for hit in (hit for record in records for hit in record["hits"]):
            add(contaminated, {hit["evaluation"]: 1})
        return {
            "format": f"{KIND} {FORMAT}",
            "documents": sum(shard["documents"] for shard in shards),
            "characters": sum(shard["characters"] for shard in shards),
            "shards": shards,
            "read": first["counts"],
            "kept": last["counts"],
            "unreadable": first["errors"],
            "passed_over": dict(sorted(first["passed_over"].items(), key=lambda item: (-item[1], item[0]))),
            **({"contaminated": contaminated} if "decontaminate" in self.config.steps else {}),
            "steps": [{"step": name, **unreached, **steps.get(name, {})} for name in self.config.steps],
            "plan": {key: value for key, value in self.plan.items() if key != "files"},
        }

    def _each(
        self,
        title: str,
        function: Callable[..., None],
        tasks: Sequence[tuple[Any, ...]],
        weights: Sequence[int],
        more: Callable[[], str] = lambda: "",
    ) -> None:
        """Run a function on all tasks, with a progress bar; each leaves files, and one that finds them is done at
        once."""
        done = 0
        with progress(title, max(1, sum(weights)), self.console) as bar:
            bar.say(lambda: f"{done:,} of {len(tasks):,} pieces{more()}")
            for number, _ in self.executor.run(function, tasks):
                done += 1
                bar.advance(weights[number])


def is_below(path: Path, directory: Path) -> bool:
    """Whether a file is in a directory; links are not followed."""
    return os.path.abspath(path).startswith(os.path.abspath(directory) + os.sep)


def parts_in(directory: Path) -> str:
    """The number of parts in a directory: progress within one large file, which is a single task."""
    return f", {len(os.listdir(directory)) // 2 if directory.exists() else 0:,} parts"  # a part is two files


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


def refuse_what_is_not_ours(out: Path) -> None:
    """Raise `ConfigError` where `out` holds something else than a curation."""
    ours = (out / WORK).exists() or is_curation(out)
    if out.is_dir() and not ours and any(path.name != LOCK for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no curation; give a new directory with --out")


def refuse_what_is_lost(out: Path, manifest: Json) -> None:
    """Raise `ConfigError` where a shard that the manifest lists is not there, or not whole."""
    for shard in manifest["shards"]:
        path = out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            what = f"has another size than {MANIFEST} says" if path.is_file() else "is missing"
            raise ConfigError(f"{path} {what}; copy it back, or remove {out} and curate again (it is a finished run)")
