"""Checkpoints of a run: groups of tensors and a JSON state, of which a whole one can always be found.

    RUN/checkpoints/step-00000020/
        weights.safetensors        one file per group, of any number of groups
        optimizer.safetensors
        state.json                 counters and whatever else is not a tensor
        manifest.json              bytes and SHA-256 of the files above

A checkpoint is written under a temporary name (it begins with a dot), each file fsynced, then renamed: a crash or
a full disk leaves the earlier ones as they were. Reading hashes every file before any of it is used, so a flipped
byte is refused by name and the checkpoint before it is taken. Steps are one line of history: saving step 20 drops
checkpoints of later steps, which a run resumed from an earlier one has abandoned.

Price: hashing costs about a second per gigabyte, in writing hidden behind the disk, in reading not.
No copy of the tensors is made on the host.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from arriero.checkpoint.files import read_json, sync, write_json
from arriero.errors import CheckpointError

FORMAT = 1  # of manifest.json
CHUNK = 1 << 23  # bytes hashed and written at a time
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk, quota and file-size limit

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose every file has been checked against its manifest."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read one group, on the CPU."""
        file = self.path / _file(group)
        if not file.exists():
            raise CheckpointError(
                f"{self.path}: it holds no '{group}', only {sorted(f.stem for f in self.path.glob('*.safetensors'))}; "
                "resume with the recipe that wrote it"
            )
        return load_file(file)


def save(
    run_dir: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int = 2,
    keep: Collection[int] = (),
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep_last` and the steps in `keep`.

    `state` is anything that JSON holds. Raises `CheckpointError` when the disk is full: nothing is lost then.
    """
    assert keep_last >= 1, keep_last
    target = path_of(run_dir, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.mkdir()
        files = {_file(group): _write(temporary / _file(group), tensors) for group, tensors in groups.items()}
        write_json(temporary / "state.json", dict(state))
        files["state.json"] = _fingerprint(temporary / "state.json")
        write_json(temporary / "manifest.json", {"format": FORMAT, "step": step, "files": files})
        for path in (*temporary.iterdir(), temporary):
            sync(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in FULL:
            _refuse_full(run_dir, step, groups, error)
        raise
    if target.exists():  # damaged, or of a history that was abandoned
        _remove(target)
    os.rename(temporary, target)
    sync(target.parent)
    _prune(run_dir, step, keep_last, keep)
    return target


def latest(run_dir: Path) -> Saved | None:
    """Return the newest whole checkpoint, or None when there is none at all.

    A damaged one is logged as a warning that names the file and what is wrong with it, and the one before it is
    taken. Raises `CheckpointError` when all are damaged.
    """
    damage = []
    for step in reversed(steps(run_dir)):
        try:
            return at_step(run_dir, step)
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
            damage.append(str(error))
    if damage:
        raise CheckpointError(
            f"{run_dir}: every checkpoint is damaged; start the run again. " + "; ".join(damage),
        )
    return None


def at_step(run_dir: Path, step: int) -> Saved | None:
    """Return the checkpoint of one step, or None. Raises `CheckpointError` naming the file when it is damaged."""
    path = path_of(run_dir, step)
    if not path.is_dir():
        return None
    manifest = read_json(path / "manifest.json")
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or manifest.get("step") != step or not isinstance(files, dict):
        raise CheckpointError(f"{path / 'manifest.json'}: it is not the manifest of step {step} in format {FORMAT}")
    for name in {"state.json"} | files.keys():
        _verify(path / name, files.get(name))
    return Saved(path, step, read_json(path / "state.json"))


def path_of(run_dir: Path, step: int) -> Path:
    """Return the directory of one step's checkpoint, whether it is there or not."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint, damaged or not, in ascending order."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


# -- one file ----------------------------------------------------------------------------------------------------


def _file(group: str) -> str:
    assert re.fullmatch(r"[\w-]+", group), group
    return f"{group}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one group in the safetensors format, hashing on the way; return its fingerprint.

    The format is a length (8 bytes), that many bytes of JSON, and the tensors. The library's own writer would need a
    second pass to hash, brings all tensors from the GPU at once, and refuses those that share memory.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in _chunks(tensors):
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    # the widest types first: each tensor then begins at a multiple of its own width
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, offset = {}, 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path, expected: Any) -> None:
    """Raise `CheckpointError`, naming the file and what is wrong, unless its fingerprint is `expected`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    found = _fingerprint(path)
    if found == expected:
        return
    if isinstance(expected, dict) and found["bytes"] != expected.get("bytes"):
        raise CheckpointError(
            f"{path}: damaged, {found['bytes']} bytes long where manifest.json says {expected.get('bytes')}"
        )
    raise CheckpointError(f"{path}: damaged, its SHA-256 is not the one in manifest.json")


# -- the folder --------------------------------------------------------------------------------------------------


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


def _refuse_full(run_dir: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], error: OSError) -> NoReturn:
    needed = sum(t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values())
    free = shutil.disk_usage(run_dir).free
    found = steps(run_dir)
    raise CheckpointError(
        f"{run_dir}: no room for the checkpoint of step {step} ({error.strerror}): it needs {needed / 1e6:.1f} MB and "
        f"{free / 1e6:.1f} MB are free; make room, then resume. "
        + (f"The checkpoint of step {found[-1]} is whole" if found else "There is no earlier checkpoint")
    ) from error
