"""What the inference engine asks of a model: run tokens of several sequences at once, and give the logits wanted.

A step takes any mix of tokens: whole prompts, pieces of prompts, one token of each of many running sequences. Keys and
values lie in a paged cache: blocks of `BLOCK` tokens, owned by nobody but the scheduler, which tells each sequence's
blocks in a table. The step writes the keys and values of its tokens at their positions, and every token attends to all
positions of its sequence up to its own.

Two implementations: the C++ step (native_step.py), whose logits of a token are the same bits in whatever batch it runs,
and its slow twin in torch (torch_step.py), for every device, architecture and type, equal within rounding.

Shapes: n tokens of a step, s sequences in it, b blocks of the longest, m tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from arriero.model.lora_config import LoraConfig

BLOCK = 32
"""Tokens whose keys and values lie together: position p of a sequence is slot p % BLOCK of its block p // BLOCK."""


class Share(NamedTuple):
    """Threads that are lent: function(team, items, work, data) in C calls work(data, item) on them for each item."""

    function: int
    team: int
    owner: object
    """What the threads end with."""


@dataclass(frozen=True)
class StepInput:
    """The tokens of one step. Those of a sequence come in the order of their positions, without gaps.

    tokens: int64 [n]. positions: int32 [n], in their sequences. sequences: int32 [n], rows of `tables`.
    tables: int32 [s, b], the blocks of each sequence; what lies behind its last one is not read.
    outputs: int32 [m], indices into the tokens. adapters: the name of each sequence's adapter [s], None for none.
    """

    tokens: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    tables: np.ndarray
    outputs: np.ndarray
    adapters: Sequence[str | None]


class Step(Protocol):
    """A model with a paged cache of its own."""

    n_blocks: int
    """Blocks of the cache: ids 0 to n_blocks - 1."""
    vocab_size: int

    @property
    def share(self) -> Share | None:
        """The step's own threads, for what is done between steps, so that there are no others beside them."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights as the step holds them ("weights"), and of the cache ("cache")."""

    def __call__(self, batch: StepInput) -> Tensor:
        """Logits fp32 [m, V] on the CPU."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of block `source` to block `target` for each (source, target), in order."""

    def add_adapter(self, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Carry one more adapter, which sequences name from now on; tensors as `lora_state` names them, on the CPU.

        The engine gives every adapter that it loads a name of its own, so none is ever replaced.
        """

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter that no sequence names any more."""

    def refit(self, name: str, tensor: Tensor) -> None:
        """Take new values for the weight of that name (Hugging Face's); what the cache holds is no longer read.

        Raises `ConfigError` for a name that the model lacks, or another shape.
        """
