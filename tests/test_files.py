"""Directories for results, and their locks."""

import pytest

from arriero.errors import ConfigError
from arriero.files import LOCK, locked, make_output

BUSY = ConfigError("busy")


def test_a_directory_is_held_by_one_and_left_as_it_was_found(tmp_path):
    made, found = tmp_path / "a" / "made", tmp_path / "found"
    found.mkdir()
    for directory in (made, found):
        with locked(directory, BUSY), pytest.raises(ConfigError, match="busy"), locked(directory, BUSY):
            pytest.fail("held twice")
    assert not made.exists() and found.is_dir() and not list(found.iterdir())


def test_a_lock_that_was_taken_away_is_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock_and_lose(file, how):
        (tmp_path / LOCK).unlink()  # the one before has finished between our opening and our locking

    monkeypatch.setattr(fcntl, "flock", flock_and_lose)
    with pytest.raises(ConfigError, match="busy"), locked(tmp_path, BUSY):
        pytest.fail("nothing is held")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: nothing can be written there \(it is a file\); give another --out"):
        make_output(tmp_path / "file")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"nothing can be written there \(no permission\)"):
        make_output(tmp_path)
