"""A checkpoint's name by its content: what changes it, and what does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers.subjects import byte_level
from helpers.toys import toy_model

from arriero.checkpoint.digest import content_digest
from arriero.checkpoint.hf import save_hf
from arriero.model.config import LlamaConfig

CONFIG = LlamaConfig(32, 1, 4, 2, 48, 271, 64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_hf(toy_model(CONFIG), tmp_path / "model", byte_level())
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_byte_is_noticed_where_size_and_times_are_equal(source: Path, name: str) -> None:
    before, stat = content_digest(source), (source / name).stat()
    data = bytearray((source / name).read_bytes())
    data[len(data) // 2] ^= 1
    (source / name).write_bytes(data)
    os.utime(source / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (source / name).stat().st_size == stat.st_size
    assert (source / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert content_digest(source) != before


def test_copies_and_what_is_no_part_of_a_model_change_nothing(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    os.utime(tmp_path / "copy" / "config.json")
    assert content_digest(tmp_path / "copy") == content_digest(source)
    one, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one.write_bytes(b"weights")
    other.write_bytes(b"weights")
    assert content_digest(one) == content_digest(other)


def test_files_that_swap_their_names_are_another_model(source: Path) -> None:
    (source / "a.json").write_text("1")
    (source / "b.json").write_text("2")
    before = content_digest(source)
    (source / "a.json").write_text("2")
    (source / "b.json").write_text("1")
    assert content_digest(source) != before
