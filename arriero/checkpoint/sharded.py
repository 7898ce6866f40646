"""Checkpoints that one or many processes write together, in the background of the training.

The file format and the reading are in native.py. A save has four steps:

1. Each process copies its part to the host, so that training can continue and change the tensors.
2. A background thread writes the process's files, hashing on the way.
3. Process 0 gathers names, sizes and hashes of all files.
4. Process 0 writes the manifest and renames the directory: the checkpoint appears whole or not at all.

If one process cannot write its part, the save fails on all of them with the same error. At most one save is in flight.

Weights are gathered tensor by tensor, each on the process that writes it, so that they lie whole, in Hugging Face's
layout; optimizer state and averages are written as the local shards that the processes hold. Any number of processes,
sharded in any way, can read either.

Price: before `save` returns, an all-gather of the weights (as much communication as a forward pass) and a copy of the
local shards on the host; the writing is in the background. A single process on a CPU writes at once: a copy would cost
memory, and writing would compete with training for the same cores.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from arriero.checkpoint import native
from arriero.distributed.peers import Peers
from arriero.errors import CheckpointError, UserError

log = logging.getLogger(__name__)

Groups = Mapping[str, Mapping[str, Tensor]]
Piece = tuple[str, Tensor, Sequence[int]]  # its name, itself, and where it begins in the whole tensor


@dataclass(frozen=True)
class Part:
    """This process's part of one group; `offsets` are those of each shard in its tensor."""

    tensors: dict[str, Tensor]
    offsets: dict[str, Sequence[int]]


class Checkpoints:
    """The checkpoints in `run_dir`, for one of the processes that write and read them together."""

    def __init__(
        self,
        run_dir: Path,
        peers: Peers | None = None,
        holders: Sequence[int] | None = None,
        keep_last: int = 2,
        sidecars: Callable[[Path], None] | None = None,
        behind: bool | None = None,
    ) -> None:
        """holders: ranks that hold the same names as this process, in parts or in copies; None: all.

        sidecars(directory): writes the files beside the weights, such as config.json. behind: write in a background
        thread; None does so except for a single process on a CPU.
        """
        self.run_dir, self.keep_last, self.sidecars = run_dir, keep_last, sidecars
        self.peers = peers or Peers()
        self.holders = list(holders) if holders is not None else list(range(self.peers.world))
        self.behind = behind if behind is not None else self.peers.world > 1 or torch.cuda.is_available()
        self._writers = self.peers.for_thread("save")  # the same processes, for the background thread
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # -- writing -------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        groups: Groups,
        state: Mapping[str, Any],
        keep: Collection[int] = (),
        own: Collection[str] = (),
    ) -> None:
        """Save the checkpoint of `step`; every process calls it. Returns as soon as what is saved may be changed.

        own: groups of which each process gives tensors of its own, whole and under names that no other gives.
        Waits for the save before this one. Raises `CheckpointError` if that one failed, or if this one does where
        nothing is written in the background.
        """
        self.wait()
        parts = {group: self._part(group, tensors, group in own) for group, tensors in groups.items()}
        arguments = step, parts, json.loads(json.dumps(state)), tuple(keep)  # a copy, all the way down
        if not self.behind:
            self._write(*arguments)
            return
        self._thread = threading.Thread(target=self._try_to_write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save in flight is on the disk. Raises `CheckpointError` if it has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def failed(self) -> bool:
        """Whether the save in flight is known to have failed; `wait` raises what happened."""
        return self._failure is not None

    def _try_to_write(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # raised by `wait`
            self._failure = error

    def _write(self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any], keep: Collection[int]) -> None:
        """This process's files, and on process 0 the checkpoint of all. Fails everywhere when it fails anywhere."""
        peers, topic = self._writers, f"checkpoint of step {step}"
        failure, refusal = None, None
        if peers.rank == 0:
            failure = _attempt(native.begin, self.run_dir, step)
            if failure is not None:
                refusal = f"{self.run_dir}: the {topic} cannot be begun ({_text(failure)}); mend that, then resume"
        refusal = peers.broadcast(topic, refusal)
        if refusal is None:
            written, failure = self._write_own(step, parts)
            every = peers.gather(topic, written)
            if every is not None:
                ending = _attempt(self._conclude, step, every, state, keep)
                failure, refusal = failure or ending, _text(ending)
            refusal = peers.broadcast(topic, refusal)
        if failure is not None and not isinstance(failure, OSError | CheckpointError):
            raise failure  # a mistake of ours keeps its traceback
        if refusal is not None:
            raise CheckpointError(refusal) from failure

    def _write_own(self, step: int, parts: Mapping[str, Part]) -> tuple[dict[str, Any], Exception | None]:
        """Write this process's files; returns the message on them for process 0, and what went wrong, if anything."""
        files: dict[str, Any] = {}

        def write() -> None:
            temporary = native.temporary_of(self.run_dir, step)
            for group, part in parts.items():
                offsets = part.offsets if self.peers.world > 1 else None
                files.update(native.write(temporary, group, part.tensors, offsets, self.peers.rank, self.peers.world))

        failure = _attempt(write)
        return {
            "bytes": sum(native.n_bytes(part.tensors) for part in parts.values()),
            "files": files,
            "weights": list(parts[native.WEIGHTS].tensors) if native.WEIGHTS in parts else [],
            "error": _text(failure),
            "full": _is_full(failure),
        }, failure

    def _conclude(
        self, step: int, written: Sequence[Mapping[str, Any]], state: Mapping[str, Any], keep: Collection[int]
    ) -> None:
        """Process 0: make a checkpoint of the files that the processes wrote, or remove them and raise the reason."""
        needed = sum(own["bytes"] for own in written)
        try:
            self._raise_failures(step, written)
            files = {name: prints for own in written for name, prints in own["files"].items()}
            holders = _holders(written) if self.peers.world > 1 else None
            native.finish(
                self.run_dir, step, files, state, self.keep_last, keep, sidecars=self.sidecars, holders=holders
            )
        except Exception as error:
            native.abandon(self.run_dir, step)  # first, so that the room it took counts as free
            if _is_full(error):
                raise native.no_room(self.run_dir, step, needed, _text(error)) from error
            raise

    def _raise_failures(self, step: int, written: Sequence[Mapping[str, Any]]) -> None:
        """Raise the first failure that a process reports."""
        for rank, own in enumerate(written):
            if own["full"]:
                raise OSError(errno.ENOSPC, own["error"])
            if own["error"] is not None:
                raise CheckpointError(f"{self.run_dir}: process {rank} did not save step {step}: {own['error']}")

    # -- what this process writes --------------------------------------------------------------------------------

    @torch.no_grad()
    def _part(self, group: str, tensors: Mapping[str, Tensor], own: bool) -> Part:
        part = Part({}, {})
        if own:
            held: Iterator[Piece] = ((name, tensor, [0] * tensor.ndim) for name, tensor in tensors.items())
        elif group == native.WEIGHTS and self.peers.world > 1:
            held = self._whole(tensors)
        else:
            held = self._pieces(tensors)
        for name, tensor, begins in held:
            part.tensors[name] = tensor.detach().to("cpu", copy=True) if self.behind else tensor.detach()
            part.offsets[name] = begins
        return part

    def _whole(self, tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
        """Whole tensors, each on one of the processes that hold it: on the one that has the fewest bytes so far."""
        loads = dict.fromkeys(self.holders, 0)
        for name, tensor in tensors.items():
            owner = min(loads, key=loads.__getitem__)
            loads[owner] += tensor.numel() * tensor.element_size()
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if owner == self.peers.rank:
                yield name, gathered, [0] * gathered.ndim

    def _pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
        """What this process holds and no process before it: of copies, the first is written."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, DTensor):
                if self.peers.rank == self.holders[0]:
                    yield name, tensor, [0] * tensor.ndim
                continue
            coordinate = tensor.device_mesh.get_coordinate()
            assert coordinate is not None, name
            axes = zip(coordinate, tensor.placements, strict=True)
            first = all(at == 0 for at, placement in axes if placement.is_replicate())
            piece = tensor.to_local()
            if first and (piece.numel() or not tensor.numel()):
                yield name, piece, list(tensor.__create_chunk_list__()[0].offsets)

    # -- reading -------------------------------------------------------------------------------------------------

    def latest(self) -> native.Saved | None:
        """The newest whole checkpoint, or None; the same on every process (see `native.newest_whole`).

        Each process hashes a part of the files; where one of them refuses a checkpoint, all of them do.
        """
        steps = self.peers.broadcast("checkpoints", native.steps(self.run_dir) if self.peers.rank == 0 else None)
        return native.newest_whole(self.run_dir, steps, self.at_step, quiet=self.peers.rank != 0)

    def at_step(self, step: int) -> native.Saved | None:
        """`native.at_step`, the same on every process."""
        peers, saved, error = self.peers, None, None
        try:
            saved = native.at_step(self.run_dir, step, peers.rank, peers.world)
        except CheckpointError as refusal:
            error = str(refusal)
        found = peers.gather(f"checkpoint of step {step} read", [saved is not None, error])
        if found is not None:
            seen = [there or error is not None for there, error in found]
            error = next((error for _, error in found if error is not None), None)
            if any(seen) and not all(seen):
                error = (
                    f"{native.path_of(self.run_dir, step)}: process {seen.index(False)} does not see it; "
                    "the run directory has to lie on a file system that all machines share"
                )
        if (error := peers.broadcast(f"checkpoint of step {step} read", error)) is not None:
            raise CheckpointError(error)
        return saved


def _holders(written: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The file of each weight: all weights that a process wrote are in one file."""
    folder = native.WEIGHTS + "/"
    return {
        weight: file.removeprefix(folder)
        for own in written
        for file in own["files"]
        if file.startswith(folder)
        for weight in own["weights"]
    }


def _attempt(do: Callable[..., Any], *arguments: Any) -> Exception | None:
    """Call a function; returns what it raises."""
    try:
        do(*arguments)
    except Exception as error:
        return error
    return None


def _is_full(error: Exception | None) -> bool:
    """Whether the disk, the quota or the limit of a file's size was reached."""
    return isinstance(error, OSError) and error.errno in native.FULL


def _text(error: Exception | None) -> str | None:
    """The reason as text; for a full disk the system's reason alone, which process 0 completes to a sentence."""
    if error is None:
        return None
    if isinstance(error, OSError) and _is_full(error):
        return error.strerror
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
