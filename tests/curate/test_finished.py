"""A finished curation: what is lost of it is named, and what is none is left alone."""

import json

import pytest

from arriero.curate.config import CurateConfig
from arriero.errors import ConfigError

from .conftest import run


def test_a_shard_that_was_lost_is_named(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    shard = max((tmp_path / "out").glob("shard-*"))
    whole = shard.read_bytes()
    for damaged, message in ((None, f"{shard.name} is missing; copy it back"), (whole[1:], "another size")):
        shard.unlink(missing_ok=True)
        if damaged is not None:
            shard.write_bytes(damaged)
        with pytest.raises(ConfigError, match=message):
            run(corpus, tmp_path / "out")
    shard.write_bytes(whole)
    run(corpus, tmp_path / "out")


@pytest.mark.parametrize("manifest", ["{", "[]", json.dumps({"format": "arriero-shards-1"})])
def test_a_manifest_of_something_else_is_left_alone(corpus, tmp_path, manifest):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match="out is not empty and holds no curation; give a new directory with --out"):
        run(corpus, tmp_path / "out")


def test_pieces_without_end_are_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"part_mb is {value}; it must be a (finite )?number"):
            CurateConfig(part_mb=value)
