"""The processes of a run as a mesh: who holds which part of the model, and who works on which rows.

One process without torch.distributed is a mesh too, so that a training loop asks no questions. Under torchrun the
process group is opened here and closed by the mesh's `close` (or its `with`).

A mesh has five dimensions, outermost first: pp, dp_replicate, dp_shard, cp, tp. What is summed over the whole mesh
(tokens, losses, squared norms) is counted once, by the processes that `leads` names.
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
    """This process's place among all. `config` is fitted to the number of processes; `device` is where it computes."""

    def __init__(self, config: ParallelConfig, device: torch.device, processes: DeviceMesh | None = None) -> None:
        self.config, self.device, self._processes = config, device, processes
        if processes is not None:
            processes["dp_shard", "cp"]._flatten("fsdp")  # context parallel processes shard the weights too
            # That a whole tensor takes two gathers, along fsdp and tp, is meant.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    @property
    def distributed(self) -> bool:
        """Whether there is anyone else."""
        return self._processes is not None

    @property
    def home(self) -> torch.device:
        """Where this process's part of the weights lies between steps."""
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
        """The processes that hold the same layers as this one, in parts or in copies."""
        size = self.world // self.config.pp  # the pipeline is the outermost dimension
        return range(self.place("pp") * size, (self.place("pp") + 1) * size)

    def place(self, dimension: str) -> int:
        """This process's coordinate along one of DIMENSIONS."""
        return 0 if self._processes is None else self._processes.get_local_rank(dimension)

    @property
    def dp_rank(self) -> int:
        """Which share of the rows is this process's, of `dp_size`."""
        return self.place("dp_replicate") * self.config.dp_shard + self.place("dp_shard")

    @property
    def dp_size(self) -> int:
        """Number of shares that a global batch is cut into."""
        return self.config.dp

    def share(self, n: int) -> range:
        """This process's share of n things that every data-parallel process has an equal and contiguous share of."""
        return equal_share(n, self.dp_rank, self.dp_size)

    def leads(self, *dimensions: str) -> bool:
        """Whether this process is the first along all of `dimensions`, and so counts for its peers there."""
        return all(self.place(name) == 0 for name in dimensions)

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
        """Each number summed over the data-parallel shares; the other processes of a share hold the same."""
        if not self.distributed:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        return self.sum(own if self.leads("pp", "cp", "tp") else torch.zeros_like(own)).tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process, so that all can act alike."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device))) if self.distributed else flag

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    @contextmanager
    def one_before_others(self) -> Iterator[None]:
        """What process 0 does here, all others do after it, and find it done (a cache filled, a file written).

        Where process 0 finds a user's mistake, the others try it themselves: to them it is the same mistake.
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
    """Join the processes that torchrun started (environment WORLD_SIZE, RANK, LOCAL_RANK), or be one alone.

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
            backend = "cpu:gloo,cuda:nccl"  # what lies on the host is gathered there
        if world == 1:  # a group of its own: it is the sharding that offloads
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            join(backend, fitted.timeout)
    degrees = tuple(getattr(fitted, name) for name in DIMENSIONS)
    return Mesh(fitted, here, init_device_mesh(here.type, degrees, mesh_dim_names=DIMENSIONS))


def equal_share(n: int, rank: int, size: int) -> range:
    """Which of n things process `rank` of `size` takes: neighbours, equally many each."""
    each, rest = divmod(n, size)
    assert rest == 0, "ParallelConfig.check_batch has seen to it"
    return range(rank * each, (rank + 1) * each)
