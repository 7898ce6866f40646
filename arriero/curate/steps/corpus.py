"""Steps that need the whole corpus: duplicates, frequent lines, rare words. Memory is bounded.

Each step is a map-reduce. `collect` extracts the keys of each document as a structured array, and `pack` writes those
of a part (some 10,000 documents) to one file. `ranges` divides the key space so that each range holds at most `AT_ONCE`
records of all parts together, and `reduce` decides one range, independently of the others, into a file. `decide` looks
up a part's documents in these files. So any number of processes gives the same result, and none holds more than one
range: 8 million records, some 300 MB. (Near duplicates are clustered by one process: about 30 bytes a document, and up
to 1 GB to sort.)

Of duplicates the first in the order of the corpus is kept; of equal URLs the newest.
"""

from __future__ import annotations

import bisect
import datetime
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from arriero.curate import minhash
from arriero.curate.batch import Batch, Result, with_text
from arriero.curate.document import Document
from arriero.curate.minhash import MinHashConfig
from arriero.curate.rules import TokenOutlier
from arriero.curate.rules.llama import BUCKET_BITS
from arriero.curate.spans import BLANK
from arriero.errors import ConfigError

Records = NDArray[Any]
AT_ONCE = 1 << 23  # records that one `reduce` holds
SAME = np.dtype([("key", "<u8"), ("check", "<u8"), ("order", "<i8"), ("row", "<u4")])
DROPPED = np.dtype([("part", "<u4"), ("row", "<u4"), ("kept_part", "<u4"), ("kept_row", "<u4")])
LINE = np.dtype([("key", "<u8"), ("count", "<u4")])
COUNT = np.dtype([("bucket", "<u4"), ("count", "<u8")])


class KeyFile(NamedTuple):
    """What `pack` made of one part: its file, its number of records, and how many documents the corpus has before
    it."""

    path: Path
    records: int
    documents_before: int


class Range(NamedTuple):
    """One piece of the work of `reduce`: the files it reads, and range number `number` of `of` of keys."""

    files: tuple[int, ...]
    number: int = 0
    of: int = 1


@dataclass
class Decisions:
    """The files that `reduce` wrote, as one part sees them."""

    arrays: Iterable[Records]
    part: int
    documents_before: int
    twin: Callable[[int, int], Document]
    """The document at (part, row), for examples."""


def whole(files: Sequence[KeyFile]) -> list[Range]:
    """All files in one range: for what needs little memory."""
    return [Range(tuple(range(len(files))))]


def by_key(files: Sequence[KeyFile], which: Sequence[int] | None = None) -> list[Range]:
    """Ranges of keys with at most about AT_ONCE records each; keys are hashes, so equal ranges are equally full."""
    chosen = tuple(range(len(files)) if which is None else which)
    n = max(1, -(-sum(files[i].records for i in chosen) // AT_ONCE))
    return [Range(chosen, index, n) for index in range(n)]


def records_of(files: Sequence[KeyFile], piece: Range) -> Iterator[tuple[int, Records]]:
    """The records of each file whose key is in the range; files are sorted by key."""
    low, high = (-(-(i << 64) // piece.of) for i in (piece.number, piece.number + 1))
    for number in piece.files:
        records = np.load(files[number].path, mmap_mode="r")
        if piece.of > 1:
            keys = records["key"]
            records = records[bisect.bisect_left(keys, low) : bisect.bisect_left(keys, high)]
        yield number, np.array(records)


# Equal documents


class _Same:
    """Of documents with an equal key, the one with the least `order`, then the first, is kept."""

    reason: ClassVar[str]
    ranges = staticmethod(by_key)

    def pack(self, collected: Sequence[Records]) -> Records:
        records = np.concatenate([np.empty(0, SAME), *collected])
        return records[np.lexsort((records["check"], records["key"]))]

    def reduce(self, files: Sequence[KeyFile], piece: Range) -> Records:
        parts, rows = [], []
        for number, records in records_of(files, piece):
            parts.append(np.full(len(records), number, np.uint32))
            rows.append(records)
        part, record = np.concatenate([np.empty(0, np.uint32), *parts]), np.concatenate([np.empty(0, SAME), *rows])
        order = np.lexsort((record["row"], part, record["order"], record["check"], record["key"]))
        part, record = part[order], record[order]
        again = np.zeros(len(record), bool)
        again[1:] = (record["key"][1:] == record["key"][:-1]) & (record["check"][1:] == record["check"][:-1])
        kept = np.maximum.accumulate(np.where(again, 0, np.arange(len(record))))[again]
        return _dropped(part[again], record["row"][again], part[kept], record["row"][kept])

    def decide(self, batch: Batch, rows: Sequence[int], decisions: Decisions) -> Result:
        return _without_dropped(batch, rows, decisions, self.reason)


@dataclass(frozen=True)
class ExactDedup(_Same):
    """Keep the first of documents with the same text (BLAKE2b, 128 bits). Costs about 1 ms for a million characters."""

    name: ClassVar[str] = "exact-dedup"
    reason: ClassVar[str] = "same text"

    def collect(self, batch: Batch, rows: Sequence[int]) -> Records:
        """A record for each document."""
        digests = [_digest(document.text) for document in batch.documents]
        return np.array([(*digest, 0, row) for digest, row in zip(digests, rows, strict=True)], SAME)


@dataclass(frozen=True)
class UrlDedup(_Same):
    """Keep the newest of documents with the same URL (Llama 3, arXiv 2407.21783, section 3.1.1); without one, all.

    URLs are the same without scheme, "www.", fragment and last slash. A date that is not ISO 8601 counts as the oldest.
    """

    name: ClassVar[str] = "url-dedup"
    reason: ClassVar[str] = "same URL, older"

    def collect(self, batch: Batch, rows: Sequence[int]) -> Records:
        """A record for each document with a URL."""
        return np.array(
            [
                (*_digest(canonical_url(document.url)), -_seconds(document.date), row)
                for document, row in zip(batch.documents, rows, strict=True)
                if document.url
            ],
            SAME,
        )


def canonical_url(url: str) -> str:
    """What is left of a URL when spellings of the same page are made equal."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:  # such as a broken IPv6 address: then only the very same text is the same
        return url
    host = (parts.netloc or "").lower().removeprefix("www.").removesuffix(":80").removesuffix(":443")
    return host + (parts.path.rstrip("/") or "") + (f"?{parts.query}" if parts.query else "")


def _digest(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _seconds(date: str) -> int:
    """Seconds since 1970 of an ISO 8601 date; the least number for any other text."""
    try:
        moment = datetime.datetime.fromisoformat(re.sub(r"Z$", "+00:00", date.strip()))
    except ValueError:
        return -(1 << 62)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp())


def _dropped(part: Records, row: Records, kept_part: Records, kept_row: Records) -> Records:
    out = np.empty(len(part), DROPPED)
    out["part"], out["row"], out["kept_part"], out["kept_row"] = part, row, kept_part, kept_row
    return out[np.lexsort((out["row"], out["part"]))]


def _without_dropped(batch: Batch, rows: Sequence[int], decisions: Decisions, reason: str) -> Result:
    dropped: dict[int, tuple[int, int]] = {}
    for array in decisions.arrays:
        first = bisect.bisect_left(array["part"], decisions.part)
        last = bisect.bisect_right(array["part"], decisions.part)
        low = bisect.bisect_left(array["row"], rows[0], first, last) if rows else first
        high = bisect.bisect_right(array["row"], rows[-1], first, last) if rows else first
        dropped |= {int(r): (int(kept_part), int(kept_row)) for _, r, kept_part, kept_row in array[low:high]}
    return [
        (document, None if row not in dropped else Twin(reason, *dropped[row]))
        for document, row in zip(batch.documents, rows, strict=True)
    ]


class Twin(str):
    """A reason that knows which document was kept instead."""

    part: int
    row: int

    def __new__(cls, reason: str, part: int, row: int) -> Twin:
        twin = super().__new__(cls, reason)
        twin.part, twin.row = part, row
        return twin


# Near duplicates


@dataclass(frozen=True)
class NearDedup:
    """Keep the first of each cluster of documents that share most of their 5-word shingles (curate/minhash.py)."""

    name: ClassVar[str] = "near-dedup"
    ranges = staticmethod(whole)

    settings: MinHashConfig

    @property
    def dtype(self) -> np.dtype[Any]:
        """The record of one document."""
        return np.dtype([
            ("row", "<u4"), ("keys", "<u8", (self.settings.bands,)), ("signature", "<u4", (self.settings.hashes,)),
        ])  # fmt: skip

    def collect(self, batch: Batch, rows: Sequence[int]) -> Records:
        """A record for each document."""
        records = np.empty(len(rows), self.dtype)
        records["row"] = rows
        records["signature"] = minhash.signatures(batch.analysis, self.settings)
        records["keys"] = minhash.band_keys(records["signature"], self.settings)
        return records

    def pack(self, collected: Sequence[Records]) -> Records:
        """In the order of the part."""
        records = np.concatenate([np.empty(0, self.dtype), *collected])
        return records[np.argsort(records["row"], kind="stable")]

    def reduce(self, files: Sequence[KeyFile], piece: Range) -> Records:
        """The documents to drop, each with the one it duplicates. Keys and signatures are in two temporary files."""
        starts = np.append(0, np.cumsum([file.records for file in files]))
        total, scratch = (
            int(starts[-1]),
            [file.path.with_name(name) for file in files[:1] for name in (".keys", ".signatures")],
        )
        if not total:
            return np.empty(0, DROPPED)
        for path in scratch:  # new files, not old ones cut to nothing: a worker of a killed run may still map those
            path.unlink(missing_ok=True)
        try:
            keys = np.memmap(scratch[0], np.uint64, "w+", shape=(self.settings.bands, total))
            signatures = np.memmap(scratch[1], np.uint32, "w+", shape=(total, self.settings.hashes))
            rows = np.empty(total, np.uint32)
            for start, file in zip(starts.tolist(), files, strict=False):
                records, at = np.load(file.path, mmap_mode="r"), slice(start, start + file.records)
                keys[:, at], signatures[at], rows[at] = records["keys"].T, records["signature"], records["row"]
            kept = minhash.clusters(keys.T, signatures, self.settings)
        finally:
            for path in scratch:
                path.unlink(missing_ok=True)
        out = np.flatnonzero(kept != np.arange(total))
        part = [np.searchsorted(starts, which, side="right") - 1 for which in (out, kept[out])]
        return _dropped(part[0], rows[out], part[1], rows[kept[out]])

    def decide(self, batch: Batch, rows: Sequence[int], decisions: Decisions) -> Result:
        """Drop all but the first of each cluster."""
        return _without_dropped(batch, rows, decisions, "near duplicate")


# Frequent lines


@dataclass(frozen=True)
class LineDedup:
    """Remove lines that many documents have, such as menus and notices; drop what has no lines left.

    Llama 3 removes lines that occur more than 6 times in a bucket of 30 million documents (arXiv 2407.21783, section
    3.1.1, after CCNet). Here a line counts once for each document, since repetition within one is Gopher's to judge:
    else a play would lose the names of its speakers. For corpora of millions of documents that share little, set
    more_than higher.
    """

    name: ClassVar[str] = "line-dedup"

    more_than: int = 6
    """Lines of more than so many documents are removed."""
    bucket: int = 30_000_000
    """Documents among which lines are counted."""
    min_characters: int = 1
    """Shorter lines are left alone."""

    def __post_init__(self) -> None:
        for field in ("more_than", "bucket", "min_characters"):
            if getattr(self, field) < 1:
                raise ConfigError(f"line_dedup.{field} is {getattr(self, field)}; it must be at least 1")

    def collect(self, batch: Batch, rows: Sequence[int]) -> Records:
        """A record for each different line of each document."""
        lines = batch.analysis.lines
        counted = ~lines.having(BLANK) & (lines.length >= self.min_characters) & ~lines.repeated
        records = np.empty(int(counted.sum()), LINE)
        records["key"], records["count"] = lines.hash[counted], 1
        return records

    def pack(self, collected: Sequence[Records]) -> Records:
        """One record for each different line, sorted."""
        return _summed(np.concatenate([np.empty(0, LINE), *collected]))

    def ranges(self, files: Sequence[KeyFile]) -> list[Range]:
        """Ranges of keys for each bucket of documents."""
        buckets: dict[int, list[int]] = {}
        for number, file in enumerate(files):
            buckets.setdefault(file.documents_before // self.bucket, []).append(number)
        return [piece for members in buckets.values() for piece in by_key(files, members)]

    def reduce(self, files: Sequence[KeyFile], piece: Range) -> Records:
        """The frequent lines, sorted."""
        lines = _summed(np.concatenate([np.empty(0, LINE), *(records for _, records in records_of(files, piece))]))
        bucket = files[piece.files[0]].documents_before // self.bucket if piece.files else 0
        frequent = lines["key"][lines["count"] > self.more_than]
        return np.concatenate([np.array([bucket], np.uint64), frequent])  # the first number says of which bucket

    def decide(self, batch: Batch, rows: Sequence[int], decisions: Decisions) -> Result:
        """Each document without the frequent lines of its bucket."""
        analysis, bucket = batch.analysis, decisions.documents_before // self.bucket
        lines = analysis.lines
        frequent = np.zeros(len(lines.hash), bool)
        for array in decisions.arrays:
            keys = array[1:]
            if int(array[0]) == bucket and len(keys):
                at = np.minimum(np.searchsorted(keys, lines.hash), len(keys) - 1)
                frequent |= keys[at] == lines.hash
        frequent &= ~lines.having(BLANK) & (lines.length >= self.min_characters)
        results: Result = [(document, None) for document in batch.documents]
        for i in np.unique(lines.document[frequent]).tolist():
            out = frequent[int(lines.first[i]) : int(lines.first[i + 1])]
            document = batch.documents[i]
            kept = [line for line, gone in zip(document.text.split("\n"), out, strict=True) if not gone]
            text = "\n".join(kept).strip("\n")
            results[i] = (with_text(document, text), None if text.strip() else "only frequent lines")
        return results


def _summed(lines: Records) -> Records:
    """One record for each key, sorted, with the sum of its counts."""
    lines = lines[np.argsort(lines["key"], kind="stable")]
    starts = np.flatnonzero(np.append(True, lines["key"][1:] != lines["key"][:-1])) if len(lines) else np.empty(0, int)
    out = np.empty(len(starts), LINE)
    out["key"] = lines["key"][starts]
    out["count"] = np.add.reduceat(lines["count"], starts) if len(starts) else 0
    return out


# Unusual words


@dataclass(frozen=True)
class CorpusOutlier:
    """Drop documents whose words are spread unlike this corpus': `TokenOutlier` with its own distribution."""

    name: ClassVar[str] = "token-outlier"
    ranges = staticmethod(whole)

    rule: TokenOutlier

    def collect(self, batch: Batch, rows: Sequence[int]) -> Records:
        """Counts of the buckets that occur."""
        return _sparse(self.rule.count(batch.analysis))

    def pack(self, collected: Sequence[Records]) -> Records:
        """Counts of the part."""
        return _sparse(_dense(collected))

    def reduce(self, files: Sequence[KeyFile], piece: Range) -> Records:
        """Counts of the corpus, int64 [2**20]."""
        return _dense(np.load(file.path) for file in files)

    def decide(self, batch: Batch, rows: Sequence[int], decisions: Decisions) -> Result:
        """Drop documents far from the corpus."""
        [corpus] = decisions.arrays
        return list(zip(batch.documents, self.rule.judge(batch.analysis, corpus), strict=True))


def _sparse(counts: NDArray[np.int64]) -> Records:
    buckets = np.flatnonzero(counts)
    out = np.empty(len(buckets), COUNT)
    out["bucket"], out["count"] = buckets, counts[buckets]
    return out


def _dense(collected: Any) -> NDArray[np.int64]:
    counts = np.zeros(1 << BUCKET_BITS, np.int64)
    for records in collected:
        counts[records["bucket"]] += records["count"].astype(np.int64)
    return counts
