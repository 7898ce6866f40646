"""Whose a run directory is."""

from dataclasses import replace
from pathlib import Path

import pytest

from arriero.distributed.mesh import Mesh
from arriero.errors import ConfigError, DataError
from arriero.io.files import LOCK
from arriero.settings import to_toml
from arriero.train.claim import claimed, refuse_changed
from arriero.train.config import DataConfig, SftConfig


def settings(out: Path, **changes) -> SftConfig:
    return replace(SftConfig(model="m", out=str(out), data=DataConfig(train="rows.jsonl")), **changes)


def claim(config: SftConfig):
    return claimed(config, "sft", Mesh.alone("cpu"))


def begin(config: SftConfig) -> None:
    with claim(config):
        (Path(config.out) / "data.json").write_text('{"fingerprints": {"the training data": "aa"}}')
        (Path(config.out) / "config.toml").write_text(to_toml(config, "sft"))


def test_one_process_at_a_time_trains_in_a_directory(tmp_path):
    config = settings(tmp_path / "run")
    with claim(config) as recorded:
        assert recorded is None
        with pytest.raises(ConfigError, match="run: another process trains there; wait for it, or choose another"):
            begin(replace(config, resume=True))
    assert not (tmp_path / "run").exists()  # nothing came to be there
    begin(config)
    with claim(replace(config, resume=True)) as recorded:
        assert recorded == {"the training data": "aa"}
    assert not (tmp_path / "run" / LOCK).exists()


def test_checkpoints_without_settings_are_neither_resumed_nor_begun_over(tmp_path):
    (tmp_path / "run/checkpoints/step-00000020").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"a checkpoint of step 20 but no config\.toml; put that back"):
            begin(settings(tmp_path / "run", resume=resume))


def test_a_run_without_its_record_of_the_data_is_not_resumed(tmp_path):
    begin(settings(tmp_path / "run"))
    (tmp_path / "run/data.json").write_text('{"train_fingerprint": "aa"}')
    with pytest.raises(ConfigError, match=r"data\.json: an earlier version wrote it, without what a resume compares"):
        begin(settings(tmp_path / "run", resume=True))
    (tmp_path / "run/data.json").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.json: not valid JSON"):
        begin(settings(tmp_path / "run", resume=True))
    (tmp_path / "run/data.json").unlink()
    with pytest.raises(ConfigError, match=r"a run but no data\.json, which says what it learns from; put that back"):
        begin(settings(tmp_path / "run", resume=True))


def test_how_the_same_steps_are_made_kept_and_shown_may_change(tmp_path):
    begin(settings(tmp_path / "run"))
    again = settings(tmp_path / "run", resume=True, samples=0, data=DataConfig(train="moved/rows.jsonl"))
    loop = replace(again.loop, micro_rows=2, recompute="full", save_every=3, keep_last=5, log_every=2)
    with claim(replace(again, loop=loop)) as recorded:
        assert recorded is not None
    for decisive in (replace(again, loop=replace(loop, batch_rows=2)), replace(again, method="full")):
        with pytest.raises(ConfigError, match=r"started with other settings \((loop\.batch_rows|method)\)"):
            begin(decisive)
    dropout = replace(again, out=str(tmp_path / "dropout"), lora=replace(again.lora, dropout=0.1))
    begin(replace(dropout, resume=False))
    with pytest.raises(ConfigError, match=r"started with other settings \(loop\.micro_rows\)"):  # draws it anew
        begin(replace(dropout, loop=loop))


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"file/run: nothing can be written there \(Not a directory\); give another --out"
    ):
        begin(settings(tmp_path / "file" / "run"))


def test_changed_data_is_named():
    recorded = {"source 'web'": "aa", "source 'books'": "bb"}
    refuse_changed(recorded, dict(recorded), "run out/mine")
    with pytest.raises(DataError, match=r"source 'web' has changed since run out/mine began .*put it back as it was"):
        refuse_changed(recorded, {**recorded, "source 'web'": "cc"}, "run out/mine")
    with pytest.raises(DataError, match="run out/mine was begun with source 'web', which is not in the data"):
        refuse_changed(recorded, {"source 'books'": "bb"}, "run out/mine")
    with pytest.raises(DataError, match="run out/mine was begun without source 'web'; take it away"):
        refuse_changed({"source 'books'": "bb"}, recorded, "run out/mine")
