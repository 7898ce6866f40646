"""Documents to shard, and token shards made by hand, where every token of all documents is another number.

The latter are written by the description in arriero/data/shards.py alone, so they are an independent witness of the
format too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from arriero.data.shards import Shards


def write_shards(
    directory: Path, lengths: list[int], source: str = "documents", first: int = 0, n_files: int = 2
) -> Shards:
    """A set of documents of these lengths, ids counting up from `first`, in `n_files` files."""
    directory.mkdir(parents=True, exist_ok=True)
    big = first + sum(lengths) > 2**16
    ids = np.arange(first, first + sum(lengths)).astype("<u4" if big else "<u2")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    cuts = [0, *(int(offsets[len(lengths) * k // n_files]) for k in range(1, n_files)), len(ids)]
    contents = {f"tokens-{k:05d}.bin": ids[cuts[k] : cuts[k + 1]].tobytes() for k in range(n_files)}
    contents |= {"offsets.bin": offsets.tobytes(), "bytes.bin": np.full(len(lengths), 7, dtype="<u4").tobytes()}
    files = []
    for k, (name, data) in enumerate(contents.items()):
        (directory / name).write_bytes(data)
        files.append({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        if k < n_files:
            files[-1]["n_tokens"] = cuts[k + 1] - cuts[k]
    manifest = {
        "format": "arriero-shards-1",
        "split": "train",
        "source": source,
        "tokenizer": "0" * 64,
        "bos": None,
        "eos": None,
        "vocab_size": 2**17 if big else 2**16,
        "n_documents": len(lengths),
        "n_tokens": int(offsets[-1]),
        "n_bytes": 7 * len(lengths),
        "files": files,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return Shards(directory)


def write_documents(path: Path, documents: Iterable[str | tuple[str, str]]) -> Path:
    """A JSONL file of texts, or of (text, source); left as it is where it holds them already."""
    rows = [{"text": d} if isinstance(d, str) else {"text": d[0], "source": d[1]} for d in documents]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != content:
        path.write_text(content)
    return path
