"""Curation's rules against datatrove's: the same real documents, alternating in one process.

    python bench/curate.py [--documents 3000] [--rounds 5] [--peers DIR] [--differences FILE]

Quality, repetition, C4 and FineWeb rules and MinHash signatures (5-grams, 14 x 8) on one core: documents and
megacharacters a second of CPU time, and the share of keep/drop verdicts that are equal for each rule that both have.
datatrove and spaCy (whose tokeniser its filters use for English) are no dependencies of Arriero; into a directory of
their own:

    pip install --no-deps --target DIR datatrove
    pip install --target DIR spacy loguru humanize multiprocess "xxhash<4"

datatrove's filters and signatures are called directly, without its pipeline's statistics and files, document by
document, so that filters share the words it caches. Documents: prose and WikiText of ../shared/data in pieces of
web-like length, modules and docstrings of the standard library, `pydoc_data.topics`, the descriptions of installed
packages, and files under /usr/share/doc; what is absent is left out. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.metadata
import json
import pydoc_data.topics
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arriero.curate import minhash
from arriero.curate.analysis import analyse
from arriero.curate.rules import C4Rules, FineWebRules, GopherQuality, GopherRepetition

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 256  # documents analysed together
Verdicts = dict[str, list[bool]]

# ---- documents


def documents(count: int, seed: int = 11) -> list[tuple[str, str]]:
    """(source, text) of `count` documents, as even a mixture of the sources as they allow, in random order."""
    rng = random.Random(seed)
    sources = {name: list(read(rng)) for name, read in SOURCES.items()}
    for texts in sources.values():
        rng.shuffle(texts)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count and any(sources.values()):
        chosen += [(name, texts.pop()) for name, texts in sources.items() if texts][: count - len(chosen)]
    rng.shuffle(chosen)
    return chosen


def _prose(rng: random.Random) -> Iterator[str]:
    path = SHARED / "prose.jsonl.gz"
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield from _pieces(json.loads(line)["text"], rng)


def _wiki(rng: random.Random) -> Iterator[str]:
    for path in sorted(SHARED.glob("wikitext2-*.txt")):
        yield from _pieces(path.read_text(encoding="utf-8"), rng)


def _pieces(text: str, rng: random.Random) -> Iterator[str]:
    """Whole lines, of about the lengths of web pages: log-normal, median 2,500 characters."""
    lines, size, wanted = [], 0, rng.lognormvariate(7.8, 0.9)
    for line in text.split("\n"):
        lines.append(line)
        size += len(line) + 1
        if size >= wanted:
            yield "\n".join(lines)
            lines, size, wanted = [], 0, rng.lognormvariate(7.8, 0.9)
    if lines:
        yield "\n".join(lines)


def _modules(rng: random.Random) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")[:30_000]


def _docstrings(rng: random.Random) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders)]
        yield "\n\n".join(filter(None, found))
        yield from (text for text in found if len(text) > 300)


def _topics(rng: random.Random) -> Iterator[str]:
    yield from pydoc_data.topics.topics.values()


def _readmes(rng: random.Random) -> Iterator[str]:
    for distribution in importlib.metadata.distributions():
        if text := distribution.metadata.get_payload():
            yield from _pieces(str(text), rng)


def _system(rng: random.Random) -> Iterator[str]:
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if path.is_file() and path.suffix in ("", ".txt") and path.stat().st_size < 1_000_000:
            yield from _pieces(path.read_text(encoding="utf-8", errors="replace"), rng)


SOURCES: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "prose": _prose, "wikitext": _wiki, "modules": _modules, "docstrings": _docstrings, "topics": _topics,
    "readmes": _readmes, "system": _system,
}  # fmt: skip

# ---- the two


def ours(texts: list[str]) -> tuple[Verdicts, int]:
    judges = (
        GopherQuality(),
        GopherRepetition(),
        FineWebRules(max_dup_line_char_frac=0.01),
    )  # datatrove's, not the paper's
    c4, config = C4Rules(), minhash.MinHashConfig()
    kept: Verdicts = {rule.name: [] for rule in (*judges, c4)}
    signed = 0
    for start in range(0, len(texts), BATCH):
        analysis = analyse(texts[start : start + BATCH])
        for rule in judges:
            kept[rule.name] += [reason is None for reason in rule.judge(analysis)]
        kept[c4.name] += [reason is None for _, reason in c4.edit(analysis)]
        signed += int((minhash.signatures(analysis, config)[:, 0] != minhash.NO_SHINGLE).sum())
    return kept, signed


class Datatrove:
    """Its filters under our rules' names."""

    def __init__(self, peers: Path | None) -> None:
        if peers:
            sys.path.append(str(peers))
        try:
            from datatrove.data import Document
            from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
            from datatrove.pipeline.filters import (
                C4QualityFilter,
                FineWebQualityFilter,
                GopherQualityFilter,
                GopherRepetitionFilter,
            )

            __import__("spacy")
        except ImportError as error:
            assert __doc__ is not None
            how = "\n".join(line for line in __doc__.splitlines() if line.startswith("    pip install"))
            sys.exit(f"datatrove is not to be had ({error}); into a directory DIR, which --peers then names:\n{how}")
        self.document: Any = Document
        self.filters = {
            GopherQuality.name: GopherQualityFilter(),
            GopherRepetition.name: GopherRepetitionFilter(),
            FineWebRules.name: FineWebQualityFilter(),
            C4Rules.name: C4QualityFilter(),
        }
        self.signature = MinhashDedupSignature("memory://signatures", MinhashConfig(n_grams=5))

    def __call__(self, texts: list[str]) -> tuple[Verdicts, int]:
        kept: Verdicts = {name: [] for name in self.filters}
        signed = 0
        for text in texts:
            for name, rule in self.filters.items():
                kept[name].append(self._keeps(rule, text))
            shingles = self.signature.get_shingles(text)
            if shingles.size:
                self.signature.get_signature(shingles)
                signed += 1
        return kept, signed

    def _keeps(self, rule: Any, text: str) -> bool:
        try:
            return rule.filter(self.document(text=text, id="")) is True
        except ZeroDivisionError:  # FineWeb's filter divides by the number of words
            return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5, help="parts of the documents, each timed with both in turn")
    parser.add_argument("--peers", type=Path, help="directory with datatrove and spaCy")
    parser.add_argument("--differences", type=Path, help="write documents with unequal verdicts there, as JSONL")
    args = parser.parse_args()
    chosen = documents(args.documents)
    names, texts = [name for name, _ in chosen], [text for _, text in chosen]
    datatrove = Datatrove(args.peers)
    ours(texts[:7]), datatrove(texts[:7])  # compile, load tables
    both: list[Verdicts] = [{}, {}]
    seconds: list[list[float]] = [[], []]
    for part in range(args.rounds):
        for which, run in enumerate((ours, datatrove)):
            started = time.process_time()
            kept, _ = run(texts[part :: args.rounds])
            seconds[which].append(time.process_time() - started)
            for name, verdicts in kept.items():
                both[which].setdefault(name, [False] * len(texts))[part :: args.rounds] = verdicts
    mine, theirs = both
    equal = {name: [a == b for a, b in zip(mine[name], theirs[name], strict=True)] for name in mine}
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    megacharacters = sum(map(len, texts)) / 1e6
    report = {
        "bench": "curate",
        "documents": len(texts),
        "sources": {name: names.count(name) for name in SOURCES},
        "megacharacters": round(megacharacters, 2),
        "documents/s": round(len(texts) / sum(seconds[0])),
        "datatrove documents/s": round(len(texts) / sum(seconds[1]), 1),
        "megacharacters/s": round(megacharacters / sum(seconds[0]), 1),
        "datatrove megacharacters/s": round(megacharacters / sum(seconds[1]), 3),
        "times faster": round(statistics.median(ratios)),
        "times faster, worst and best part": [round(min(ratios)), round(max(ratios))],
        "equal verdicts": {name: round(sum(same) / len(same), 5) for name, same in equal.items()},
        "kept": {name: round(sum(verdicts) / len(verdicts), 3) for name, verdicts in mine.items()},
        "equal verdicts, all": round(sum(map(sum, equal.values())) / (len(texts) * len(equal)), 5),
    }
    if args.differences:
        with open(args.differences, "w", encoding="utf-8") as file:
            for name, same in equal.items():
                for i in (i for i, one in enumerate(same) if not one):
                    row = {"rule": name, "source": names[i], "ours": mine[name][i], "text": texts[i]}
                    file.write(json.dumps(row) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
