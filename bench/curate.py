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
packages, and files under /usr/share/doc; what is absent is left out. Prints one JSON line. Near duplicates are chance
between 0.6 and 0.8 of similarity: datatrove with another seed agrees with itself no more than with us (docs/log.md).
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib.metadata
import json
import pydoc_data.topics
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arriero.curate import minhash
from arriero.curate.analysis import analyse
from arriero.curate.rules import C4Rules, FineWebRules, GopherQuality, GopherRepetition

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 256  # documents analysed together

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


@dataclass
class Outcome:
    """What one of the two makes of the documents it was given, in their order."""

    kept: dict[str, list[bool]] = field(default_factory=dict)
    """For each rule the verdict on each document."""
    c4_texts: list[str] = field(default_factory=list)
    """Each document after C4's edits, "" where it is dropped."""
    bands: list[list[bytes]] = field(default_factory=list)
    """The bands of each signature, none where a document is too short for one."""


class Arriero:
    """Our rules, with datatrove's threshold where it is not the paper's."""

    def __init__(self) -> None:
        self.judges = GopherQuality(), GopherRepetition(), FineWebRules(max_dup_line_char_frac=0.01)
        self.c4 = C4Rules(min_words=3, min_sentences=5, line_ends=(".", "?", "!", '"', "'"))
        self.config = minhash.MinHashConfig()

    def __call__(self, texts: list[str]) -> tuple[Outcome, list[np.ndarray]]:
        out = Outcome({rule.name: [] for rule in (*self.judges, self.c4)})
        signed = []
        for start in range(0, len(texts), BATCH):
            analysis = analyse(texts[start : start + BATCH])
            for rule in self.judges:
                out.kept[rule.name] += [reason is None for reason in rule.judge(analysis)]
            edited = self.c4.edit(analysis)
            out.kept[self.c4.name] += [reason is None for _, reason in edited]
            out.c4_texts += [text if reason is None else "" for text, reason in edited]
            signed.append(minhash.signatures(analysis, self.config))
        return out, signed

    def bands(self, signed: list[np.ndarray]) -> list[list[bytes]]:
        rows = [row for batch in signed for row in batch]
        return [_split(row) if (row != minhash.NO_SHINGLE).any() else [] for row in rows]


class Datatrove:
    """Its filters under our rules' names."""

    def __init__(self) -> None:
        from datatrove.data import Document
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
        from datatrove.pipeline.filters import (
            C4QualityFilter,
            FineWebQualityFilter,
            GopherQualityFilter,
            GopherRepetitionFilter,
        )

        __import__("spacy")
        self.document: Any = Document
        self.filters = {
            GopherQuality.name: GopherQualityFilter(),
            GopherRepetition.name: GopherRepetitionFilter(),
            FineWebRules.name: FineWebQualityFilter(),
        }
        self.c4 = C4QualityFilter()
        self.signature = MinhashDedupSignature("memory://signatures", MinhashConfig(n_grams=5))

    def __call__(self, texts: list[str]) -> tuple[Outcome, list[list[list[int]]]]:
        out = Outcome({name: [] for name in (*self.filters, C4Rules.name)})
        signed = []
        for text in texts:
            for name, rule in self.filters.items():
                out.kept[name].append(self._keeps(rule, self.document(text=text, id="")))
            document = self.document(text=text, id="")
            out.kept[C4Rules.name].append(self._keeps(self.c4, document))
            out.c4_texts.append(document.text if out.kept[C4Rules.name][-1] else "")
            shingles = self.signature.get_shingles(text)
            signed.append(self.signature.get_signature(shingles) if shingles.size else [])
        return out, signed

    def _keeps(self, rule: Any, document: Any) -> bool:
        try:
            return rule.filter(document) is True
        except ZeroDivisionError:  # FineWeb's filter divides by the number of words
            return False

    def bands(self, signed: list[list[list[int]]]) -> list[list[bytes]]:
        return [[np.array(band, np.uint64).tobytes() for band in bands] for bands in signed]


def _split(row: np.ndarray) -> list[bytes]:
    return [band.tobytes() for band in np.split(row, minhash.MinHashConfig().bands)]


def near_duplicates(bands: list[list[bytes]]) -> list[bool]:
    """Which documents are the first of those that share any band, directly or through others, as datatrove has it."""
    keys = np.zeros((len(bands), minhash.MinHashConfig().bands), np.uint64)
    for i, row in enumerate(bands):
        keys[i, : len(row)] = [int.from_bytes(hashlib.blake2b(band, digest_size=8).digest()) for band in row]
    return minhash.keep(keys).tolist()


# ---- the comparison


def run(texts: list[str], rounds: int, peers: list[Any]) -> tuple[list[Outcome], list[list[float]]]:
    """Each peer's outcome for all texts, and its CPU seconds for each of `rounds` parts of them, taken in turn."""
    outcomes, seconds = [Outcome() for _ in peers], [[0.0] * rounds for _ in peers]
    for peer in peers:
        peer(texts[:7])  # compile, load tables
    size = -(-len(texts) // rounds)
    for part in range(rounds):
        for peer, outcome, times in zip(peers, outcomes, seconds, strict=True):
            started = time.process_time()
            found, signed = peer(texts[part * size : (part + 1) * size])
            times[part] = time.process_time() - started
            for name, verdicts in found.kept.items():
                outcome.kept.setdefault(name, []).extend(verdicts)
            outcome.c4_texts += found.c4_texts
            outcome.bands += peer.bands(signed)
    return outcomes, seconds


def comparison(ours: Outcome, theirs: Outcome) -> dict[str, object]:
    """How far the two agree, as shares of the documents."""
    equal = {name: share(verdicts, theirs.kept[name]) for name, verdicts in ours.kept.items()}
    duplicates = [near_duplicates(outcome.bands) for outcome in (ours, theirs)]
    return {
        "equal verdicts": equal,
        "equal verdicts, all four": round(statistics.mean(equal.values()), 5),
        "equal texts after C4's edits": share(ours.c4_texts, theirs.c4_texts),
        "equal verdicts on near duplicates": share(*duplicates),
        "near duplicates": [len(kept) - sum(kept) for kept in duplicates],
    }


def share(a: list[Any], b: list[Any]) -> float:
    return round(sum(x == y for x, y in zip(a, b, strict=True)) / len(a), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5, help="parts of the documents, each timed with both in turn")
    parser.add_argument("--peers", type=Path, help="directory with datatrove and spaCy")
    parser.add_argument("--differences", type=Path, help="write documents with unequal verdicts there, as JSONL")
    args = parser.parse_args()
    chosen = documents(args.documents)
    names, texts = [name for name, _ in chosen], [text for _, text in chosen]
    peers: list[Any] = [Arriero()]
    if args.peers:
        sys.path.append(str(args.peers))
    try:
        peers.append(Datatrove())
    except ImportError as error:
        assert __doc__ is not None
        how = "\n".join(line for line in __doc__.splitlines() if line.startswith("    pip install"))
        print(f"no comparison, {error}; into a directory DIR, for --peers DIR:\n{how}", file=sys.stderr)
    outcomes, seconds = run(texts, args.rounds, peers)
    megacharacters = sum(map(len, texts)) / 1e6
    report: dict[str, object] = {
        "bench": "curate",
        "documents": len(texts),
        "sources": {name: names.count(name) for name in SOURCES},
        "megacharacters": round(megacharacters, 2),
        "kept": {name: round(statistics.mean(verdicts), 3) for name, verdicts in outcomes[0].kept.items()},
    }
    for peer, times in zip(peers, seconds, strict=True):
        report[f"{type(peer).__name__} documents/s"] = round(len(texts) / sum(times), 1)
        report[f"{type(peer).__name__} megacharacters/s"] = round(megacharacters / sum(times), 3)
    if len(peers) > 1:
        ratios = sorted(theirs / ours for ours, theirs in zip(*seconds, strict=True))
        report["times faster: median, least, most"] = [
            round(x) for x in (statistics.median(ratios), ratios[0], ratios[-1])
        ]
        report |= comparison(*outcomes)
        if args.differences:
            with open(args.differences, "w", encoding="utf-8") as file:
                for name, verdicts in outcomes[0].kept.items():
                    for i, (a, b) in enumerate(zip(verdicts, outcomes[1].kept[name], strict=True)):
                        if a != b:
                            row = {"rule": name, "source": names[i], "ours": a, "text": texts[i]}
                            file.write(json.dumps(row) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
