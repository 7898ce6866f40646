"""Checkpoints of a training run: groups of tensors and a JSON state, written so that a whole one can always be found.

    RUN/checkpoints/step-00000020/
        weights/model.safetensors           one folder per group; many processes write several files:
        optimizer/optimizer.safetensors       model-00001-of-00004.safetensors ... with model.safetensors.index.json
        state.json                          counters and all other state that is not a tensor
        manifest.json                       size and SHA-256 of the files above

`weights` is in Hugging Face's layout (where a whole model is trained, with config.json and a tokenizer, so that
transformers opens the folder). Other groups may hold local shards of tensors: each file's header has their offsets, in
the metadata format of torch.distributed.checkpoint's safetensors storage, which any number of processes can read.

A checkpoint is written in three steps, `begin`, `write` and `finish`, which sharded.py calls: into a temporary
directory (whose name begins with a dot), each file fsynced, then renamed. So a crash or a full disk leaves earlier
checkpoints as they were. Reading hashes every file before any is used; a damaged one is named, and the checkpoint
before it is read. Saving step 20 deletes checkpoints of later steps: a run that resumed from an earlier one has
abandoned them.

Price: hashing takes about a second per gigabyte; hidden behind the disk when writing, not when reading. Tensors are not
copied on the host.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from arriero.checkpoint.tensor_file import Entry, header
from arriero.errors import CheckpointError
from arriero.io.files import json_text, sync, write_json
from arriero.io.reading import read_json, reading

FORMAT = 2  # of manifest.json
WEIGHTS = "weights"  # the group that holds whole tensors by the model's own names
CHUNK = 1 << 23  # bytes hashed and written at a time
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk, quota and file-size limit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose every file has been checked against its manifest."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read one group, on the CPU, every tensor whole."""
        files = self._files(group)
        if len(files) == 1:
            with reading(files[0]):
                return load_file(files[0])
        whole = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in self.shapes(group).items()}
        self.read(group, whole)
        return whole

    def shapes(self, group: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor of one group, from the headers alone."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        directory = self._files(group)[0].parent
        with reading(directory):
            known = _storage(directory).read_metadata().state_dict_metadata
        return {
            name: (tuple(tensor.size), tensor.properties.dtype)
            for name, tensor in known.items()
            if isinstance(tensor, TensorStorageMetadata)
        }

    def read(self, group: str, into: Mapping[str, Tensor]) -> None:
        """Fill the tensors of `into` in place, on any device; of a DTensor its own process's part is read, no more.

        `into` has any of the group's names, each in the shape that `shapes` gives.
        """
        from torch.distributed import checkpoint as dcp

        directory = self._files(group)[0].parent
        with warnings.catch_warnings(), reading(directory):
            # that each process reads for itself is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(dict(into), storage_reader=_storage(directory), no_dist=True)

    def _files(self, group: str) -> list[Path]:
        files = sorted((self.path / group).glob("*.safetensors"))
        if not files:
            there = sorted({file.parent.name for file in self.path.glob("*/*.safetensors")})
            raise CheckpointError(
                f"{self.path}: it holds no '{group}', only {there}; resume with the recipe that wrote it"
            )
        return files


# -- the three steps of a save -----------------------------------------------------------------------------------


def begin(run_dir: Path, step: int) -> Path:
    """Make the temporary directory that the checkpoint of `step` is written in, and remove what kills left behind."""
    temporary = temporary_of(run_dir, step)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(temporary.parent)
    temporary.mkdir()
    return temporary


def write(
    temporary: Path,
    group: str,
    tensors: Mapping[str, Tensor],
    offsets: Mapping[str, Sequence[int]] | None = None,
    part: int = 0,
    parts: int = 1,
) -> dict[str, Any]:
    """Write file `part` of `parts` of one group; returns {path within the checkpoint: fingerprint}.

    offsets: where in the whole tensor each one begins, for those that are pieces of one.
    """
    assert re.fullmatch(r"[\w-]+", group), group
    (temporary / group).mkdir(exist_ok=True)
    name = f"{group}/{_file(group, part, parts)}"
    fingerprint = _write(temporary / name, tensors, offsets)
    sync(temporary / name)
    return {name: fingerprint}


def finish(
    run_dir: Path,
    step: int,
    files: Mapping[str, Any],
    state: Mapping[str, Any],
    keep_last: int = 2,
    keep: Collection[int] = (),
    sidecars: Callable[[Path], None] | None = None,
    holders: Mapping[str, str] | None = None,
) -> Path:
    """Make a checkpoint of what was written: add state and manifest, rename, remove the old; returns its directory.

    files: what every `write` returned. sidecars(directory): writes the files beside the weights, such as config.json.
    holders: file of each weight, where there are several files.
    """
    assert keep_last >= 1, keep_last
    temporary, target = temporary_of(run_dir, step), path_of(run_dir, step)
    for name, expected in files.items():
        if not (temporary / name).exists() or (temporary / name).stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{temporary / name}: written by another process, but not to be seen by the first; "
                "the run directory has to lie on a file system that all machines share"
            )
    if sidecars is not None:
        sidecars(temporary / WEIGHTS)
    if holders:
        write_json(temporary / WEIGHTS / "model.safetensors.index.json", {"metadata": {}, "weight_map": dict(holders)})
    write_json(temporary / "state.json", dict(state))
    every = {path.relative_to(temporary).as_posix(): path for path in temporary.rglob("*") if path.is_file()}
    prints = {name: files.get(name) or _fingerprint(path) for name, path in sorted(every.items())}
    write_json(temporary / "manifest.json", {"format": FORMAT, "step": step, "files": prints})
    for path in (*temporary.rglob("*"), temporary):
        if path.relative_to(temporary).as_posix() not in files:  # those are on the disk already
            sync(path)
    if target.exists():  # damaged, or of a history that was abandoned
        _remove(target)
    os.rename(temporary, target)
    sync(target.parent)
    _prune(run_dir, step, keep_last, keep)
    return target


def abandon(run_dir: Path, step: int) -> None:
    """Remove what was written of a checkpoint that did not come to be."""
    shutil.rmtree(temporary_of(run_dir, step), ignore_errors=True)


def no_room(run_dir: Path, step: int, needed: int, reason: str | None) -> CheckpointError:
    """The error for a full disk. needed: bytes of the checkpoint. reason: the system's description of the error."""
    free, found = shutil.disk_usage(run_dir).free, steps(run_dir)
    return CheckpointError(
        f"{run_dir}: no room for the checkpoint of step {step} ({reason}): it needs {needed / 1e6:.1f} MB and "
        f"{free / 1e6:.1f} MB are free; make room, then resume. "
        + (f"The checkpoint of step {found[-1]} is whole" if found else "There is no earlier checkpoint")
    )


def size_of(run_dir: Path, step: int) -> int:
    """Bytes on the disk of one step's checkpoint."""
    return sum(file.stat().st_size for file in path_of(run_dir, step).rglob("*") if file.is_file())


def n_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that a group takes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


# -- reading -----------------------------------------------------------------------------------------------------


def newest_whole(
    run_dir: Path, found: Sequence[int], look: Callable[[int], Saved | None], quiet: bool = False
) -> Saved | None:
    """Return the newest whole checkpoint of the steps `found` (ascending), or None when there is none at all.

    look: reads the checkpoint of one step. A damaged one is logged as a warning that names the file and what is wrong
    with it, unless `quiet`, and the one before it is taken. Raises `CheckpointError` when all are damaged.
    """
    damage = []
    for step in reversed(found):
        try:
            return look(step)
        except CheckpointError as error:
            if not quiet:
                log.warning("%s; trying the checkpoint before it", error)
            damage.append(str(error))
    if damage:
        raise CheckpointError(
            f"{run_dir}: every checkpoint is damaged; start the run again. " + "; ".join(damage),
        )
    return None


def at_step(run_dir: Path, step: int, rank: int = 0, world: int = 1) -> Saved | None:
    """Return the checkpoint of one step, or None. Raises `CheckpointError` naming the file when it is damaged.

    rank, world: of `world` processes that divide the hashing, this one hashes every `world`-th file from `rank` on.
    """
    path = path_of(run_dir, step)
    if not path.is_dir():
        return None
    manifest = read_json(path / "manifest.json")
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or manifest.get("step") != step or not isinstance(files, dict):
        raise CheckpointError(f"{path / 'manifest.json'}: it is not the manifest of step {step} in format {FORMAT}")
    if elsewhere := [name for name in files if name.startswith("/") or ".." in name.split("/")]:
        raise CheckpointError(f"{path / 'manifest.json'}: damaged, it names {elsewhere[0]!r:.80}, out of its directory")
    for name in sorted({"state.json"} | files.keys())[rank::world]:
        _verify(path / name, files.get(name))
    for file in path.rglob("*.safetensors"):
        if file.relative_to(path).as_posix() not in files:  # it would be read with the others
            raise CheckpointError(f"{file}: not in manifest.json; it does not belong here: delete it")
    return Saved(path, step, read_json(path / "state.json"))


def path_of(run_dir: Path, step: int) -> Path:
    """Return the directory of one step's checkpoint, whether it is there or not."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint, damaged or not, in ascending order."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


# -- one file ----------------------------------------------------------------------------------------------------


def _file(group: str, part: int, parts: int) -> str:
    stem = "model" if group == WEIGHTS else group
    return f"{stem}.safetensors" if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None) -> dict[str, Any]:
    """Write one safetensors file, hashing on the way; return its fingerprint.

    The library's own writer would need a second pass to hash, brings all tensors from the GPU at once, and refuses
    those that share memory; torch's storage writer holds every file in memory a second time before it writes.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in _chunks(tensors, offsets):
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _chunks(tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None) -> Iterator[bytes | memoryview]:
    # the widest types first: each tensor then begins at a multiple of its own width
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    metadata = {}
    if offsets is not None:
        begins = {name: {"saved_offsets": list(offsets[name])} for name in names}
        metadata = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json_text(begins)}
    yield header({name: Entry(tuple(tensors[name].shape), tensors[name].dtype) for name in names}, **metadata)
    for name in names:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def _storage(directory: Path) -> Any:
    """torch's reader of a folder of safetensors files, whose tensors may be in pieces."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # a second: only who resumes pays it

    return HuggingFaceStorageReader(str(directory))


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path, expected: Any) -> None:
    """Raise `CheckpointError`, naming the file and what is wrong, unless its fingerprint is `expected`."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        found = _fingerprint(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if found == expected:
        return
    if isinstance(expected, dict) and found["bytes"] != expected.get("bytes"):
        raise CheckpointError(
            f"{path}: damaged, {found['bytes']} bytes long where manifest.json says {expected.get('bytes')}"
        )
    raise CheckpointError(f"{path}: damaged, its SHA-256 is not the one in manifest.json")


# -- the folder --------------------------------------------------------------------------------------------------


def temporary_of(run_dir: Path, step: int) -> Path:
    """Return the directory that the checkpoint of one step is written in before it is whole."""
    target = path_of(run_dir, step)
    return target.with_name(f".{target.name}.tmp")


def _prune(run_dir: Path, step: int, keep_last: int, keep: Collection[int]) -> None:
    found = steps(run_dir)
    newest = [s for s in found if s <= step][-keep_last:]
    for other in found:
        if other > step or (other not in newest and other not in keep):
            _remove(path_of(run_dir, other))


def _remove(path: Path) -> None:
    """Rename, then delete: a kill in between leaves no half checkpoint under a good name."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a kill in the middle of a save left behind."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)
