"""Samples the text that a vocabulary is learned from: at most a given number of bytes of a stream, some of it held out.

Documents are cut into chunks, and the chunks with the smallest hashes are kept, so the sample depends on the texts
alone: not on their order, nor on how much else is read. One hundredth of it is held out, to measure on.

Price: the sample in memory, as UTF-8; hashing runs at about 1 GB/s.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from arriero.errors import DataError
from arriero.tokenizer.base import utf8

CHUNK = 100_000  # characters; bounds what one document can weigh in a sample, and what a trainer buffers
HELD_OUT = 0.01  # share of the sample's bytes
MAX_HELD_OUT = 5_000_000  # bytes


@dataclass(frozen=True)
class Sample:
    """Chunks of text as UTF-8, in the order of their hashes, and how much text they were drawn from."""

    training: list[bytes]
    held_out: list[bytes]
    n_documents: int
    n_bytes: int

    @property
    def training_bytes(self) -> int:
        return sum(map(len, self.training))


def draw_sample(texts: Iterable[str], limit: int, progress: Callable[[int], None] = lambda n: None) -> Sample:
    """Keep the chunks of smallest hash that fit in `limit` bytes together; progress(n) is called after each n bytes.

    Raises DataError where there is no text.
    """
    kept: list[tuple[int, int, bytes]] = []  # a heap, largest hash first; the number breaks ties of equal chunks
    total = n_documents = n_bytes = number = 0
    bound = 1 << 64  # what has once been dropped would be dropped again
    for text in texts:
        n_documents += 1
        for chunk in chunks(text):
            data = utf8(chunk)
            n_bytes += len(data)
            progress(len(data))
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            if key >= bound:
                continue
            heapq.heappush(kept, (-key, number := number + 1, data))
            total += len(data)
            while total > limit:
                key, _, data = heapq.heappop(kept)
                total, bound = total - len(data), -key
    if not kept:
        raise DataError(
            "there is no text to learn from; check the sources and the text column"
            if n_bytes == 0
            else f"no chunk of text fits in a sample of {limit} bytes; give a larger sample"
        )
    in_order = [data for _, _, data in sorted(kept, key=lambda item: (-item[0], item[1]))]
    return _hold_out(in_order, total, n_documents, n_bytes)


def _hold_out(in_order: list[bytes], total: int, n_documents: int, n_bytes: int) -> Sample:
    wanted, size, n = min(total * HELD_OUT, MAX_HELD_OUT), 0, 0
    while size < wanted and n < len(in_order) - 1:
        size, n = size + len(in_order[n]), n + 1
    held_out = in_order[:n] or in_order  # a single chunk has to serve for both
    return Sample(in_order[n:], held_out, n_documents, n_bytes)


def chunks(text: str) -> Iterator[str]:
    """Cut a long text after line ends, where it has any, into chunks of at most `CHUNK` characters."""
    start = 0
    while len(text) - start > CHUNK:
        end = text.rfind("\n", start, start + CHUNK) + 1
        end = end if end > start else start + CHUNK
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
