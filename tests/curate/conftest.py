"""A small corpus with something for every step to do, and what is needed to look at what a run wrote."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from arriero.curate.config import CurateConfig
from arriero.curate.document import Document
from arriero.curate.engine import curate
from arriero.curate.sources import read_documents

WORDS = """the of and to that have with be a in is it for was on are as this from by at which river mountain llama
wool shepherd valley winter carries road village morning stone bread water always never between under again people
children market bridge letter season music garden window history question animal journey simple quiet distant"""


def prose(seed: int, sentences: int = 12) -> str:
    """English enough for every rule; two seeds share next to nothing."""
    rng = random.Random(seed)
    said = [" ".join(rng.choices(WORDS.split(), k=rng.randint(9, 17))).capitalize() + "." for _ in range(sentences)]
    return "\n".join(" ".join(said[i : i + 3]) for i in range(0, sentences, 3))


def corpus_rows() -> list[dict[str, Any]]:
    """101 prose documents, and others of which each is there for one step."""
    rows = [{"id": f"prose-{i}", "text": prose(i), "source": "web", "url": f"https://x.org/{i}"} for i in range(101)]
    near = prose(7).split(" ")
    near[40] = "otherwise"
    rows[17:17] = [
        {"id": "german", "text": "Das Lama ist eine Kamelart und in Südamerika weit verbreitet. " * 9},
        {"id": "empty", "text": " \u200b\n\r\n"},
        {"id": "short", "text": prose(300, 3)},
        {"id": "same-as-3", "text": prose(3) + "\r\n"},
        {"id": "near-7", "text": " ".join(near)},
        {"id": "repeats", "text": "I say it again and again to you. " * 60},
        {"id": "mail", "text": prose(200) + "\nWrite to jane.doe+x@mail.example.org from 8.8.8.8 or 10.0.0.1."},
        {"id": "old", "text": prose(201), "url": "http://www.y.org/page/", "date": "2021-01-05"},
        {"id": "new", "text": prose(202), "url": "https://y.org/page", "date": "2023-11-05T10:00:00Z"},
        {"id": "code-gpl", "text": "# Licensed under the GNU General\n# Public License\nx = 1\n", "source": "code"},
        {"id": "code-mit", "text": "# SPDX-License-Identifier: MIT\n\n\n\n\nprint('hello')\n", "source": "code"},
        {"id": "code-data", "text": "x = [" + "0, " * 900 + "]" + "\ny = 1" * 40, "source": "code"},
    ]
    for i in range(60, 70):
        rows[i]["text"] += "\nAll rights reserved by the village of x dot org, since 1532."
    return rows


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The corpus as two files of rows."""
    rows = corpus_rows()
    root = tmp_path / "raw"
    root.mkdir()
    for name, part in (("a.jsonl", rows[:71]), ("b.jsonl", rows[71:])):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return root


def run(corpus: Path | str, out: Path, **settings: Any) -> dict[str, Any]:
    """Curate in small parts in this process, unless told otherwise; returns the manifest."""
    settings = {"part_mb": 0.031, "shard_mb": 0.053, "workers": 1, **settings}
    return curate(CurateConfig(sources=(str(corpus),), out=str(out), **settings))


def kept(out: Path) -> list[Document]:
    """The documents of a curated directory."""
    return list(read_documents([out]))


def dropped(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What each step dropped, by reason."""
    return {entry["step"]: entry["dropped"] for entry in manifest["steps"] if entry["dropped"]}


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory, but for config.toml, which says where it lies."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "config.toml"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
