"""Data for the data tests: the real tokenizer, conversations made on the spot, and a cache of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.load import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokenised data goes to a cache that no other test has seen."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ARRIERO_CACHE", str(path))
    return path


def turns(*texts: str) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(n: int) -> list[dict[str, Any]]:
    """n different rows of different lengths."""
    counted = [" ".join(map(str, range(i % 37 + 1))) for i in range(n)]
    return [{"messages": turns(f"Count to {i}.", f"{counted[i]} and {i}")} for i in range(n)]
