"""Gathers the whole tensors of a sharded model one at a time, on the CPU of process 0.

For any use of the current weights: a file, a merged copy, an inference engine in this process or another. Only one
tensor at a time is gathered, so no process needs memory for the whole model. All processes iterate together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from arriero.distributed.mesh import Mesh


@dataclass(frozen=True)
class Source:
    """A tensor of which this process has a shard. whole(): gathers it; each process of the stage calls it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], Tensor]


def source_of(tensor: Tensor) -> Source:
    """The source of one tensor, unchanged."""
    return Source(tuple(tensor.shape), tensor.dtype, lambda: whole_tensor(tensor))


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(sources: Mapping[str, Source], mesh: Mesh, key: Callable[[str], Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of all tensors of all stages, on process 0; the others yield nothing, but take part.

    sources: of this process's stage; the first process of each later stage sends those that process 0 has not. Of a
    name that several stages have, the first one's is used. The order is that of `key(name)`. All processes iterate to
    the end, together.
    """
    firsts = [stage * (mesh.world // mesh.config.pp) for stage in range(1, mesh.config.pp)]  # of the later stages
    sent: dict[str, tuple[int, Tensor]] = {}  # what process 0 receives: from where, and into what
    asked: set[str] = set()  # what process 0 wants of this one
    if mesh.rank == 0:
        for first in firsts:
            there = _receive_names(first, mesh.device)
            lacking = {name: tensor for name, tensor in there.items() if name not in sources and name not in sent}
            _send_names(lacking, first, mesh.device)
            sent |= {name: (first, tensor) for name, tensor in lacking.items()}
    elif mesh.rank in firsts:
        _send_names(sources, 0, mesh.device)
        asked = set(_receive_names(0, mesh.device))
    for name in sorted({*sources, *sent}, key=key):
        if name in sent:
            first, tensor = sent[name]
            dist.recv(tensor, first)
            yield name, tensor.cpu()
            continue
        whole = sources[name].whole()
        if mesh.rank == 0:
            yield name, whole.cpu()
        elif name in asked:
            dist.send(whole.contiguous(), 0)


def _send_names(tensors: Mapping[str, Source | Tensor], to: int, device: torch.device) -> None:
    """Say which tensors there are."""
    rows = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    encoded = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)
    dist.send(torch.tensor([len(encoded)], device=device), to)
    dist.send(encoded, to)


def _receive_names(source: int, device: torch.device) -> dict[str, Tensor]:
    """Empty tensors like those of `source`."""
    length = torch.zeros(1, dtype=torch.long, device=device)
    dist.recv(length, source)
    encoded = torch.zeros(int(length), dtype=torch.uint8, device=device)
    dist.recv(encoded, source)
    rows = json.loads(bytes(encoded.tolist()))
    return {name: torch.empty(shape, dtype=getattr(torch, dtype), device=device) for name, dtype, shape in rows}
