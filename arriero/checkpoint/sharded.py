"""Checkpoints of many processes: each writes its own part, behind the training, and all agree that it is whole.

Format and reading are native.py's; here is what it takes to be many. What is saved is copied first, so that training
may go on and change it; then a thread writes this process's files, hashing on the way, and tells process 0 what they
are. When all have spoken, process 0 writes the manifest and renames: before that nothing is to be seen, after it all
is. A part that could not be written makes the save fail everywhere, with the same words. One save is in flight at most.

Weights are gathered, tensor by tensor, each to the process that will write it, so that they lie whole, as Hugging Face
has them; optimizer state and averages stay in the pieces that the processes hold. Any number of processes, split in
any way, reads either.

Price: in step, a gather of the weights (what a forward pass costs in communication) and a copy of the process's part
on the host; behind, the writing. A single process on a CPU writes at once: a copy would cost memory, and the writing
takes the same cores as the training.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Part:
    """What this process writes of one group; `offsets` say where each piece begins in its tensor."""

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
        companions: Callable[[Path], None] | None = None,
        behind: bool | None = None,
    ) -> None:
        """holders: ranks that hold the same names as this process, in parts or in copies; None: all.

        companions(directory): writes what stands beside the weights, such as config.json. behind: write in a thread;
        None does so unless one process on a CPU is all there is.
        """
        self.run_dir, self.keep_last, self.companions = run_dir, keep_last, companions
        self.peers = peers or Peers()
        self.holders = list(holders) if holders is not None else list(range(self.peers.world))
        self.behind = behind if behind is not None else self.peers.world > 1 or torch.cuda.is_available()
        self._speaking = self.peers.for_thread("save")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # -- writing -------------------------------------------------------------------------------------------------

    def save(self, step: int, groups: Groups, state: Mapping[str, Any], keep: Collection[int] = ()) -> None:
        """Save the checkpoint of `step`; every process calls it. Returns as soon as what is saved may be changed.

        Waits for the save before this one. Raises `CheckpointError` if that one failed, or if this one does where
        nothing is written behind.
        """
        self.wait()
        parts = {group: self._part(group, tensors) for group, tensors in groups.items()}
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
        except BaseException as error:  # it belongs to whoever waits
            self._failure = error

    def _write(self, step: int, parts: Mapping[str, Part], state: Mapping[str, Any], keep: Collection[int]) -> None:
        """This process's files, and on process 0 the checkpoint of all. Fails everywhere when it fails anywhere."""
        peers, topic = self._speaking, f"checkpoint of step {step}"
        failure = self._attempt(native.begin, self.run_dir, step) if peers.rank == 0 else None
        verdict = None
        if failure is not None:
            verdict = f"{self.run_dir}: the {topic} cannot be begun ({_text(failure)}); mend that, then resume"
        verdict = peers.announce(topic, verdict)
        if verdict is None:
            word: dict[str, Any] = {"bytes": sum(native.n_bytes(part.tensors) for part in parts.values())}
            failure = self._attempt(self._write_own, step, parts, word)
            word |= {"error": _text(failure), "full": getattr(failure, "errno", None) in native.FULL}
            if peers.rank == 0:
                ending = self._attempt(self._conclude, step, word, state, keep)
                if ending is not None:
                    native.abandon(self.run_dir, step)
                failure = failure or ending
                verdict = _text(ending)
            else:
                peers.gather(topic, word)
            verdict = peers.announce(topic, verdict)
        if failure is not None and not isinstance(failure, OSError | CheckpointError):
            raise failure  # a mistake of ours keeps its traceback
        if verdict is not None:
            raise CheckpointError(verdict) from failure

    def _write_own(self, step: int, parts: Mapping[str, Part], word: dict[str, Any]) -> None:
        """Write this process's files; `word` is what process 0 is told of them."""
        files: dict[str, Any] = {}
        for group, part in parts.items():
            offsets = part.offsets if self.peers.world > 1 else None
            files |= native.write(
                native.temporary_of(self.run_dir, step), group, part.tensors, offsets, self.peers.rank, self.peers.world
            )
        word |= {"files": files, "weights": list(parts[native.WEIGHTS].tensors) if native.WEIGHTS in parts else []}

    def _conclude(self, step: int, word: Mapping[str, Any], state: Mapping[str, Any], keep: Collection[int]) -> None:
        """Process 0: hear what the others wrote, and make it a checkpoint."""
        words = self._speaking.gather(f"checkpoint of step {step}", word)
        assert words is not None
        needed = sum(w["bytes"] for w in words)
        for rank, w in enumerate(words):
            if w["full"]:
                raise native.no_room(self.run_dir, step, needed, w["error"])
            if w["error"] is not None:
                raise CheckpointError(f"{self.run_dir}: process {rank} did not save step {step}: {w['error']}")
        files = {name: prints for w in words for name, prints in w["files"].items()}
        folder = native.WEIGHTS + "/"
        lies_in = {
            weight: file.removeprefix(folder)
            for w in words
            for file in w["files"]
            if file.startswith(folder)
            for weight in w["weights"]
        }
        index = lies_in if self.peers.world > 1 else None
        try:
            native.finish(self.run_dir, step, files, state, self.keep_last, keep, self.companions, index)
        except OSError as error:
            if error.errno in native.FULL:
                raise native.no_room(self.run_dir, step, needed, error.strerror) from error
            raise

    # -- what this process writes --------------------------------------------------------------------------------

    @torch.no_grad()
    def _part(self, group: str, tensors: Mapping[str, Tensor]) -> Part:
        whole = group == native.WEIGHTS and self.peers.world > 1
        part = Part({}, {})
        for name, tensor, begins in self._whole(tensors) if whole else self._pieces(tensors):
            part.tensors[name] = tensor.detach().to("cpu", copy=True) if self.behind else tensor.detach()
            part.offsets[name] = begins
        return part

    def _whole(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Sequence[int]]]:
        """Whole tensors, each on one of the processes that hold it: on the one that has the fewest bytes so far."""
        loads = dict.fromkeys(self.holders, 0)
        for name, tensor in tensors.items():
            owner = min(loads, key=loads.__getitem__)
            loads[owner] += tensor.numel() * tensor.element_size()
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if owner == self.peers.rank:
                yield name, gathered, [0] * gathered.ndim

    def _pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Sequence[int]]]:
        """What this process holds and no process before it: of copies, the first is written."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, DTensor):
                if self.peers.rank == self.holders[0]:
                    yield name, tensor, [0] * tensor.ndim
                continue
            place = tensor.device_mesh.get_coordinate()
            assert place is not None, name
            first = all(at == 0 for at, how in zip(place, tensor.placements, strict=True) if how.is_replicate())
            piece = tensor.to_local()
            if first and (piece.numel() or not tensor.numel()):
                yield name, piece, list(tensor.__create_chunk_list__()[0].offsets)

    # -- reading -------------------------------------------------------------------------------------------------

    def latest(self) -> native.Saved | None:
        """`native.latest`, the same on every process: each hashes a share of the files, and one's refusal is all's."""
        steps = self.peers.announce("checkpoints", native.steps(self.run_dir) if self.peers.rank == 0 else None)
        return native.newest_whole(self.run_dir, steps, self.at_step, quiet=self.peers.rank != 0)

    def at_step(self, step: int) -> native.Saved | None:
        """`native.at_step`, the same on every process."""
        peers, saved, error = self.peers, None, None
        try:
            saved = native.at_step(self.run_dir, step, peers.rank, peers.world)
        except CheckpointError as refusal:
            error = str(refusal)
        words = peers.gather(f"checkpoint of step {step} read", [saved is not None, error])
        if words is not None:
            seen = [there or error is not None for there, error in words]
            error = next((error for _, error in words if error is not None), None)
            if any(seen) and not all(seen):
                error = (
                    f"{native.path_of(self.run_dir, step)}: process {seen.index(False)} does not see it; "
                    "the run directory has to lie on a file system that all machines share"
                )
        if (error := peers.announce(f"checkpoint of step {step} read", error)) is not None:
            raise CheckpointError(error)
        return saved

    @staticmethod
    def _attempt(do: Callable[..., Any], *arguments: Any) -> Exception | None:
        try:
            do(*arguments)
        except Exception as error:
            return error
        return None


def _text(error: Exception | None) -> str | None:
    """The reason in words; of a full disk the bare reason, which process 0 puts in a sentence."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno in native.FULL:
        return error.strerror
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
