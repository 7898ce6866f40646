"""Sets and parts by the thousand, in a process that may have few files open."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.shards import write_documents

from arriero.errors import DataError
from arriero.io import handles, limits
from arriero.io.handles import Appending, MappedArray

MANY_SETS = """
import io, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
import json
from rich.console import Console
from arriero.io import handles
from arriero.data.pretrain_loader import DataStage, PretrainLoader
from arriero.data.sharding import shard_sources
from arriero.data.shards import find_sets, open_splits
from arriero.tokenizer import load_tokenizer

shard_sources(["documents.jsonl"], load_tokenizer("tok"), sys.argv[1], validation=0.1, by_source=True, part_size=3000,
              workers=1, console=Console(file=io.StringIO()))
for shards in find_sets(sys.argv[1]):
    shards.verify()
sources, _ = open_splits(sys.argv[1])
loader = PretrainLoader(sources, [DataStage(0, 32, {name: 1.0 for name in sources})], seed=0)
print(json.dumps([handles.AT_ONCE, len(sources), [loader.row(i).tokens.tolist() for i in range(600)]]))
"""


def limited(script: str, *args: object, cwd: Path) -> str:
    """What a script prints that lowers its own limit first."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_hundred_sources_are_written_and_read_alike_with_sixty_files_and_with_many(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    _byte_vocabulary(tmp_path / "tok")
    write_documents(tmp_path / "documents.jsonl", [(f"words of {i} " * 9, f"site{i % 211}") for i in range(422)])
    few, many = (limited(MANY_SETS, name, n, cwd=tmp_path) for name, n in (("few", 60), ("many", 2048)))
    assert few.startswith("[15, 2") and many.startswith("[512, 2")
    assert few.partition(",")[2] == many.partition(",")[2]
    assert _tree(tmp_path / "few") == _tree(tmp_path / "many")


def _byte_vocabulary(directory: Path) -> None:
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([], trainer)
    bpe.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')


def _tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def open_now() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process's open files")
def test_no_more_files_are_open_than_said(tmp_path: Path) -> None:
    before, out = open_now(), Appending(at_once=5)
    for turn in range(3):
        for i in range(17):
            out.write(tmp_path / f"{i}", bytes([turn, i]))
            assert open_now() <= before + 5
    for i in range(17):
        out.close(tmp_path / f"{i}")
    assert open_now() == before
    assert all((tmp_path / f"{i}").read_bytes() == bytes([0, i, 1, i, 2, i]) for i in range(17))
    sums = [int(MappedArray(tmp_path / f"{i}", "<u2", 3).array().sum()) for i in range(17)]
    assert sums == [3 + 3 * 256 * i for i in range(17)]
    assert open_now() - before <= handles.AT_ONCE


def test_a_mapped_array_is_read_in_place_and_opened_again_when_its_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import lru_cache

    monkeypatch.setattr(handles, "_mapped", lru_cache(maxsize=2)(MappedArray._map))
    for i in range(5):
        np.arange(i, i + 7, dtype="<i8").tofile(tmp_path / f"{i}")
    arrays = [MappedArray(tmp_path / f"{i}", "<i8", 7) for i in range(5)]
    for _ in range(2):
        for i, array in enumerate(arrays):
            assert array.array().tolist() == list(range(i, i + 7)) and not array.array().flags.writeable


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    np.arange(7, dtype="<i8").tofile(path)
    array = MappedArray(path, "<i8", 7)
    handles._mapped.cache_clear()
    path.unlink()
    np.arange(1, 8, dtype="<i8").tofile(path)
    with pytest.raises(DataError, match="a: the file was replaced while it was being read; run it again"):
        array.array()
    with pytest.raises(DataError, match="a: it does not hold 8 numbers"):
        MappedArray(path, "<i8", 8)


def test_the_limit_is_raised_to_what_the_user_may_have(tmp_path: Path) -> None:
    script = """
import resource
from arriero.io.limits import open_files, raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (77, 311))
raise_open_files()
print(open_files(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert limited(script, cwd=tmp_path) == "311 (311, 311)\n"


def test_a_limit_above_what_is_wanted_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**20, 2**30))
    limits.raise_open_files()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    limits.raise_open_files()
    assert asked == [(2**16, resource.RLIM_INFINITY)]
