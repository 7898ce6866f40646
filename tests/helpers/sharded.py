"""Tensors that every process knows whole, saved and read back in pieces by groups of processes.

`python -m helpers.sharded STEPS.json` is one process of a group; each step is a layout and what to do with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.distributed.peers import Peers, peers_of_this_run
from arriero.errors import CheckpointError

SHAPES = {"a.weight": (7, 11), "b.weight": (13, 5), "c.weight": (3, 2), "d.weight": (17,), "e.weight": (1, 19)}
LAYOUTS = {  # mesh, and how each tensor lies on it
    "fsdp": ("all", [Shard(0)]),
    "columns": ("all", [Shard(1)]),
    "hsdp": ("square", [Replicate(), Shard(0)]),
    "2d": ("square", [Shard(0), Shard(1)]),
    "copies": ("all", [Replicate()]),
}


def known(step: int) -> dict[str, dict[str, Tensor]]:
    """Weights, optimizer state with scalars and several types, and an average, of one step."""
    rng = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    moments = {f"{name}/exp_avg": torch.randn(shape, generator=rng).double() for name, shape in SHAPES.items()}
    counts = {f"{name}/step": torch.tensor(float(step)) for name in SHAPES}
    average = {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in SHAPES.items()}
    return {"weights": weights, "optimizer": moments | counts, "average": average}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The tensor as a DTensor of that layout; scalars, and what has too few dimensions, in other ways."""
    world = dist.get_world_size()
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", (world,) if shape == "all" else (2, world // 2))
    if tensor.ndim == 0:
        return tensor
    placements = [Shard(0) if isinstance(p, Shard) and p.dim >= tensor.ndim else p for p in placements]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def save(checkpoints: Checkpoints, step: int, layout: str) -> None:
    """Save what is known of `step`, then change it at once, and wait."""
    groups = {
        group: {name: laid_out(t.clone(), layout) for name, t in tensors.items()}
        for group, tensors in known(step).items()
    }
    own = {f"{checkpoints.peers.rank}/answer": torch.arange(5 * step + checkpoints.peers.rank)}
    groups |= {"journal": own, "nothing": {}}
    checkpoints.save(step, groups, {"step": step}, own={"journal", "nothing"})
    for tensors in groups.values():
        for tensor in tensors.values():
            tensor.zero_()
    checkpoints.wait()


def read(checkpoints: Checkpoints, step: int, layout: str) -> None:
    """Read the newest checkpoint into pieces; it has to be that of `step`."""
    saved = checkpoints.latest()
    assert saved is not None and saved.step == step == saved.state["step"], saved
    for group, tensors in known(step).items():
        into = {name: laid_out(torch.zeros_like(t), layout) for name, t in tensors.items()}
        saved.read(group, into)
        for name, t in into.items():
            assert torch.equal(t if t.ndim == 0 else t.full_tensor(), tensors[name]), (group, name, layout)


def torch_writes(checkpoints: Checkpoints, layout: str) -> None:
    """What torch's own storage writer saves is read in pieces, and its reader with its planner reads ours."""
    folder = checkpoints.run_dir / "torch" / "optimizer"
    tensors = known(1)["optimizer"]
    pieces = {name: laid_out(t, layout) for name, t in tensors.items()}
    dcp.save(pieces, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    assert not list(folder.glob(".metadata"))
    ours = native.path_of(checkpoints.run_dir, 1) / "optimizer"
    for source in (folder, ours):
        into = {name: laid_out(torch.zeros_like(t), layout) for name, t in tensors.items()}
        if source == folder:
            native.Saved(folder.parent, 1, {}).read("optimizer", into)
        else:
            dcp.load(into, storage_reader=HuggingFaceStorageReader(str(ours)))
        for name, t in into.items():
            assert torch.equal(t if t.ndim == 0 else t.full_tensor(), tensors[name]), (source, name)


def refused(checkpoints: Checkpoints, kind: str, text: str) -> None:
    """Some process fails to save, or all meet a damaged checkpoint; every process has to raise the same words."""
    try:
        if kind == "save" and checkpoints.peers.rank == 1:
            write, native.write = native.write, failing
            try:
                save(checkpoints, 99, "fsdp")
            finally:
                native.write = write
        elif kind == "save":
            save(checkpoints, 99, "fsdp")
        else:
            checkpoints.at_step(int(kind))
    except CheckpointError as error:
        assert text in str(error), error
    else:
        raise AssertionError("not refused")
    assert not list(checkpoints.run_dir.glob("checkpoints/.*"))


def damage(checkpoints: Checkpoints, file: str) -> None:
    """Flip a bit in the middle of a file, when nobody reads it."""
    dist.barrier()
    if checkpoints.peers.rank == 0:
        content = bytearray((checkpoints.run_dir / file).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoints.run_dir / file).write_bytes(content)
    dist.barrier()


def failing(*arguments: object) -> dict:
    """As on a full disk."""
    raise OSError(28, "No space left on device")


def main(run_dir: str, steps: str) -> None:
    """One process of the group."""
    dist.init_process_group("gloo")
    peers = peers_of_this_run(timeout=60)
    assert isinstance(peers, Peers)
    checkpoints = Checkpoints(Path(run_dir), peers, keep_last=100)
    for what, *arguments in json.loads(steps):
        globals()[what](checkpoints, *arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
