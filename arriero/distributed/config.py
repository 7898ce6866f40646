"""The five degrees of parallelism of a run, checked against each other, the model and the batch.

The product of the degrees is the number of processes. Neighbouring ranks communicate most, so tensor parallelism is
innermost (inside one machine), then context, sharded data, replicated data, and the pipeline outermost (Llama 3, arXiv
2407.21783, section 3.3.2). No torch here: the command line reads this module to print its help.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from arriero.errors import ConfigError
from arriero.model.config import LlamaConfig

WEEK = 7 * 24 * 3600  # seconds
Recompute = Literal["none", "full", "selective"]
"""What a block computes again in the backward pass: nothing, everything, or all but matmuls and attention."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. All at their defaults, one process is one process and more are sharded data parallel."""

    dp_replicate: int = 1
    """Copies of the sharded model, each on its own rows (HSDP); more than 1 keeps gathers inside a machine."""
    dp_shard: int = -1
    """Processes that share one copy of weights, gradients and optimizer (FSDP), each on its own rows; -1 takes all
    processes that the other degrees leave."""
    tp: int = 1
    """Processes that split every matrix and, between them, the sequence (tensor and sequence parallel)."""
    cp: int = 1
    """Processes that split the tokens of a row (context parallel, for long rows)."""
    pp: int = 1
    """Processes that split the layers (pipeline parallel)."""
    pp_chunks: int = 1
    """Ranges of layers that each pipeline process holds; more than 1 interleaves them, for a smaller bubble."""
    pp_light_ends: bool = False
    """Give the first and the last range one layer less, for the embeddings and the head that they hold."""
    reduce_every: bool = False
    """Reduce gradients after every micro-batch instead of the last only: they never lie whole in memory, at the price
    of that communication again for each micro-batch."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory: a block is on the GPU while it runs, and the
    optimizer steps on the host. For models that fit no other way; slow."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it ends with an error."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "tp", "cp", "pp", "pp_chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1 (1 switches it off)")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ConfigError(f"dp_shard is {self.dp_shard}; it must be at least 1, or -1 for all that are left")
        if self.pp_chunks > 1 and self.pp == 1:
            raise ConfigError(f"pp_chunks is {self.pp_chunks} but pp is 1; there is no pipeline to interleave")
        if self.reduce_every and self.pp > 1:
            raise ConfigError(f"reduce_every is on but pp is {self.pp}; a pipeline reduces after its last micro-batch")
        if not 0 < self.timeout <= WEEK:
            raise ConfigError(f"timeout is {self.timeout}; it must be above 0 seconds and at most {WEEK:,} (a week)")

    @property
    def dp(self) -> int:
        """Groups of processes that work on different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.dp * self.tp * self.cp * self.pp

    def fitted(self, world: int) -> ParallelConfig:
        """With dp_shard filled in for `world` processes. Raises `ConfigError` where the degrees do not give `world`."""
        rest = self.dp_replicate * self.tp * self.cp * self.pp
        named = f"dp_replicate {self.dp_replicate} x tp {self.tp} x cp {self.cp} x pp {self.pp}"
        if self.dp_shard == -1:
            if world % rest:
                raise ConfigError(
                    f"{named} is {rest}, but {world} processes were started, which is no multiple of it; "
                    "start another number of processes or change a degree"
                )
            return dataclasses.replace(self, dp_shard=world // rest)
        if self.world != world:
            raise ConfigError(
                f"dp_shard {self.dp_shard} x {named} is {self.world}, but {world} processes were started; "
                "set dp_shard to -1, or start as many"
            )
        return self

    def layers(self, n_layers: int) -> list[range]:
        """The layers of each of the pp x pp_chunks stages, in order; as equally many as possible, longer ranges first.

        Raises `ConfigError` where a stage would be empty. Stage s is on pipeline process s mod pp.
        """
        stages, light = self.pp * self.pp_chunks, int(self.pp_light_ends and self.pp > 1)
        base, longer = divmod(n_layers + 2 * light, stages)
        sizes = [base + (stage < longer) for stage in range(stages)]
        sizes[0] -= light
        sizes[-1] -= light
        if min(sizes) < 1:
            raise ConfigError(
                f"pp {self.pp} x pp_chunks {self.pp_chunks} makes {stages} stages of {n_layers} layers, and one would "
                "be empty; lower pp or pp_chunks" + (", or switch pp_light_ends off" if light else "")
            )
        ends = [sum(sizes[: stage + 1]) for stage in range(stages)]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def check_model(self, model: LlamaConfig) -> None:
        """Raise `ConfigError` where the model cannot be split so."""
        for name in ("n_kv_heads", "n_heads", "ffn_dim", "vocab_size"):
            if getattr(model, name) % self.tp:
                raise ConfigError(
                    f"tp {self.tp} does not divide the model's {name} {getattr(model, name)}; each process holds an "
                    "equal share of heads, feed-forward and vocabulary"
                )
        self.layers(model.n_layers)

    def check_batch(self, batch_rows: int, micro_rows: int, seq_len: int) -> None:
        """Raise `ConfigError` where a global batch of `batch_rows` rows of `seq_len` tokens cannot be divided evenly.

        `self` is fitted. `micro_rows` rows go through the model at once on each data-parallel process.
        """
        assert self.dp_shard > 0, "fit the degrees to the world first"
        parts = 2 * self.cp * self.tp if self.cp > 1 else self.tp
        if seq_len % parts:
            halves = "2 x " if self.cp > 1 else ""
            raise ConfigError(
                f"seq_len {seq_len} is not a multiple of {parts} ({halves}cp {self.cp} x tp {self.tp}); "
                "the sequence is split into that many equal parts"
            )
        if batch_rows % (micro_rows * self.dp):
            raise ConfigError(
                f"batch_rows {batch_rows} is not a multiple of micro_rows {micro_rows} x {self.dp} data-parallel "
                "processes; change one of them"
            )
        micro_batches = batch_rows // (micro_rows * self.dp)
        if micro_batches < self.pp and self.pp > 1:
            raise ConfigError(
                f"batch_rows {batch_rows} gives each pipeline {micro_batches} micro-batches of {micro_rows} rows, "
                f"fewer than its {self.pp} processes; raise batch_rows or lower micro_rows"
            )
        if self.pp_chunks > 1 and micro_batches % self.pp:
            raise ConfigError(
                f"batch_rows {batch_rows} gives each pipeline {micro_batches} micro-batches, not a multiple of "
                f"pp {self.pp}, which interleaving needs; change batch_rows"
            )
