"""The package as others install it: a wheel built from the repository, in an environment without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from arriero.model.catalogue import SHAPES
from arriero.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


def output(*command: str | Path, cwd: Path) -> str:
    """What a command prints; the test fails where the command does."""
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, cwd=cwd, env=outside | {"PIP_NO_INPUT": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes into the sources, and would pack what an earlier build left there."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "sources"
    shutil.copytree(ROOT / "arriero", copy / "arriero", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "--isolated", "wheel", "--quiet", "--disable-pip-version-check")
    output(*pip, "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", place, copy, cwd=place)
    (built,) = place.glob("*.whl")
    return built


def installed(wheel: Path, place: Path) -> Path:
    """The commands of a new environment that holds the wheel alone, and sees the packages that Arriero needs.

    A folder named in a .pth file is searched, but the .pth files within it are not read: so an editable install of
    Arriero beside these packages stays unseen.
    """
    venv.create(place, symlinks=os.name != "nt")
    inside = {key: Path(sysconfig.get_path(key, "venv", {"base": str(place)})) for key in ("purelib", "scripts")}
    pip = (sys.executable, "-m", "pip", "--isolated", "--python", inside["scripts"] / "python", "--quiet")
    output(*pip, "--disable-pip-version-check", "install", "--no-index", "--no-deps", wheel, cwd=place)
    packages = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    (inside["purelib"] / "needed.pth").write_text("\n".join(packages), encoding="utf-8")
    return inside["scripts"]


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "arriero").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("arriero/")} == sources
    kinds = {".py", ".cpp", ".h", ".html", ".css", ".js", ".jinja", ".typed"}
    assert {PurePosixPath(name).suffix for name in sources} == kinds


def test_the_installed_wheel_helps_lists_models_and_tokenises(wheel: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    commands = installed(wheel, tmp_path / "environment")
    imported = output(commands / "python", "-c", "import arriero; print(arriero.__file__)", cwd=tmp_path)
    assert Path(imported.strip()).is_relative_to(tmp_path)
    assert output(commands / "arriero", "--help", cwd=tmp_path).startswith("usage: arriero COMMAND")
    models = output(commands / "arriero", "ls", "models", cwd=tmp_path).splitlines()[1:]
    assert [line.split()[0] for line in models] == list(SHAPES)
    text = "Why do llamas hum?"
    ids = output(commands / "arriero", "tokenizer", "encode", "smollm2-135m", text, cwd=tmp_path)
    assert [int(number) for number in ids.split()] == load_tokenizer(smollm2_gguf).encode(text)
