"""The processes of a run as a device mesh: which part of the model and which rows each of them has.

A single process without torch.distributed is a mesh too, so that a training loop needs no case for it. Under torchrun
the process group is opened here and closed by the mesh's `close` (or at the end of its `with`).

A mesh has five dimensions, outermost first: pp, dp_replicate, dp_shard, cp, tp. A quantity that several processes have
in common (tokens, losses, squared norms) is counted once in a sum over the mesh: by the process for which `is_first`
holds along the dimensions in question.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from arriero.distributed.config import ParallelConfig
from arriero.distributed.peers import join
from arriero.errors import UserError

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


class Mesh:
    """The mesh, seen from this process.

    config: the degrees of parallelism, whose product is the number of processes. device: of this process.
    """

    def __init__(self, config: ParallelConfig, device: torch.device, processes: DeviceMesh | None = None) -> None:
        self.config, self.device, self._processes = config, device, processes
        if processes is not None:
            processes["dp_shard", "cp"]._flatten("fsdp")  # context-parallel processes shard the weights too
            # That a whole tensor takes two gathers, along fsdp and tp, is meant.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    @property
    def distributed(self) -> bool:
        """Whether torch.distributed is used."""
        return self._processes is not None

    @property
    def home(self) -> torch.device:
        """The device of this process's weights between steps."""
        return torch.device("cpu") if self.config.cpu_offload else self.device

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.config.world

    @classmethod
    def alone(cls, device: torch.device | str) -> Mesh:
        """The mesh of one process."""
        return cls(ParallelConfig(dp_shard=1), torch.device(device))

    @property
    def rank(self) -> int:
        """This process's number among all."""
        return 0 if self._processes is None else dist.get_rank()

    @property
    def stage_ranks(self) -> range:
        """The ranks of the processes that hold the same layers as this one, sharded or replicated."""
        size = self.world // self.config.pp  # the pipeline is the outermost dimension
        return range(self.coordinate("pp") * size, (self.coordinate("pp") + 1) * size)

    def coordinate(self, dimension: str) -> int:
        """This process's coordinate along one of DIMENSIONS."""
        return 0 if self._processes is None else self._processes.get_local_rank(dimension)

    @property
    def dp_rank(self) -> int:
        """The index of this process's data-parallel group, from 0 to `dp_size` - 1."""
        return self.coordinate("dp_replicate") * self.config.dp_shard + self.coordinate("dp_shard")

    @property
    def dp_size(self) -> int:
        """The number of data-parallel groups, each of which has a shard of the global batch."""
        return self.config.dp

    def local_shard(self, n: int) -> range:
        """Which of n items (rows, micro-batches) are this process's; every data-parallel group has equally many."""
        return local_shard(n, self.dp_rank, self.dp_size)

    def is_first(self, *dimensions: str) -> bool:
        """Whether this process has coordinate 0 along all of `dimensions`."""
        return all(self.coordinate(name) == 0 for name in dimensions)

    def sub(self, *dimensions: str) -> DeviceMesh:
        """The processes that differ from this one only along `dimensions` ("fsdp" is dp_shard with cp)."""
        assert self._processes is not None
        with warnings.catch_warnings():  # it was to go in torch 2.11 and is there in 2.13, with no other way to HSDP
            warnings.filterwarnings("ignore", "Slicing a flattened dim")
            return self._processes[dimensions if len(dimensions) > 1 else dimensions[0]]

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all processes; it is changed in place and returned."""
        if self.distributed:
            dist.all_reduce(value)
        return value

    def count(self, *numbers: float) -> list[float]:
        """Each number summed over the data-parallel groups; all processes of a group give the same numbers."""
        if not self.distributed:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        return self.sum(own if self.is_first("pp", "cp", "tp") else torch.zeros_like(own)).tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device))) if self.distributed else flag

    def wait(self) -> None:
        """A barrier: wait until all processes have come here."""
        self.any(False)

    @contextmanager
    def one_before_others(self) -> Iterator[None]:
        """Run the block on process 0 first, and on the others when it is done: they find its caches and files.

        Where it raises a `UserError` on process 0, the others run it all the same, and raise it too.
        """
        if self.rank > 0:
            self.wait()
        try:
            yield
        except UserError:
            if self.rank == 0:
                self.wait()
            raise
        if self.rank == 0:
            self.wait()

    def close(self) -> None:
        """Leave the process group."""
        if self.distributed and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def init_mesh(config: ParallelConfig, device: str) -> Mesh:
    """The mesh of the processes that torchrun started (environment WORLD_SIZE, RANK, LOCAL_RANK), or of this one alone.

    device: "cpu" (gloo) or "cuda" (nccl, the GPU of LOCAL_RANK). Raises `ConfigError` where the degrees do not fit.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fitted = config.fitted(world)
    here = torch.device(device)
    if world == 1 and not fitted.cpu_offload:
        return Mesh(fitted, here)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        backend = "nccl" if here.type == "cuda" else "gloo"
        if fitted.cpu_offload and here.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"  # offloaded tensors are gathered on the host
        if world == 1:  # FSDP does the offloading, and needs a group even for one process
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            join(backend, fitted.timeout)
    degrees = tuple(getattr(fitted, name) for name in DIMENSIONS)
    return Mesh(fitted, here, init_device_mesh(here.type, degrees, mesh_dim_names=DIMENSIONS))


def local_shard(n: int, rank: int, size: int) -> range:
    """The shard of n items that is `rank`'s of `size`: contiguous, and equally many for each."""
    each, rest = divmod(n, size)
    assert rest == 0, "ParallelConfig.check_batch has seen to it"
    return range(rank * each, (rank + 1) * each)
