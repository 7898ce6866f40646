"""Estimates the cost of a way to parallelise a model: memory, bytes sent, pipeline bubble.

The numbers are those of this implementation, for the process with the largest part. Weights, gradients and moments are
exact (but that norms are counted as matrices). Activations are those of compiled blocks (a test counts them; uncompiled
blocks keep about 40% more), without temporaries and fragmentation of the allocator, so leave 10 to 20% of a GPU free.
Collectives are counted as rings: of n bytes each of m processes sends n (m - 1) / m. No torch here.

Shapes: T tokens of a micro-batch on one process's part of the row, D model width, F FFN width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table

from arriero.distributed.config import ParallelConfig, Recompute
from arriero.model.config import LlamaConfig

WIDE, NARROW = 4, 2  # bytes of fp32 and bf16
CHUNK = 256  # positions whose logits are held at once (losses/lm.py)
BLOCK = 256  # values that share a scale (optim/adamw8bit.py)

Optimizer = Literal["adamw", "adamw8bit", "muon"]
MOMENTS: dict[Optimizer, str] = {
    "adamw": "AdamW's moments, fp32",
    "adamw8bit": "AdamW's moments, 8 bits",
    "muon": "Muon's and AdamW's moments, fp32",
}


@dataclass(frozen=True)
class Cost:
    """Per process. Memory in bytes; `sent` in bytes a step; `bubble` is the share of time that a pipeline idles."""

    processes: int
    micro_batches: int  # of a step, through each pipeline
    tokens: int  # of a global batch
    flops: float  # of the model's own work, a step and process
    memory: dict[str, int]
    sent: dict[str, int]
    bubble: float
    host: dict[str, int] = field(default_factory=dict)  # bytes of the host's memory, with cpu_offload

    @property
    def total(self) -> int:
        """Bytes of memory, the host's apart."""
        return sum(self.memory.values())

    def table(self) -> Table:
        """The costs as people read them."""
        table = Table(title="each process", show_header=False)
        table.add_row("processes", f"{self.processes:,}")
        table.add_row("tokens a step", f"{self.tokens:,} in {self.micro_batches:,} micro-batches a pipeline")
        for part, size in self.memory.items():
            table.add_row(f"memory: {part}", f"{size / 1e9:,.2f} GB")
        table.add_row("memory: sum", f"{self.total / 1e9:,.2f} GB")
        for part, size in self.host.items():
            table.add_row(f"host's memory: {part}", f"{size / 1e9:,.2f} GB")
        for part, size in self.sent.items():
            table.add_row(f"sent a step: {part}", f"{size / 1e9:,.2f} GB")
        table.add_row("work a step", f"{self.flops / 1e12:,.0f} TFLOP")
        table.add_row("pipeline bubble", f"{self.bubble:.1%} of the time")
        return table


def cost(
    model: LlamaConfig,
    parallel: ParallelConfig,
    *,
    seq_len: int,
    batch_rows: int,
    micro_rows: int = 1,
    recompute: Recompute = "none",
    optimizer: Optimizer = "adamw",
    in_backward: bool = False,
) -> Cost:
    """Cost of training `model` in bf16 with fp32 master weights, split by `parallel` (fitted: dp_shard is given).

    batch_rows, micro_rows: rows of `seq_len` tokens in a global batch, and through a process at once. in_backward: no
    gradient outlives its own step. Raises what `ParallelConfig` raises for degrees that do not fit model or batch.
    """
    parallel.check_model(model)
    parallel.check_batch(batch_rows, micro_rows, seq_len)
    n_micro = batch_rows // (micro_rows * parallel.dp)
    tokens = micro_rows * seq_len // parallel.cp
    held = _fullest(model, parallel)
    state = _state(model, parallel, held, optimizer, in_backward)
    return Cost(
        processes=parallel.world,
        micro_batches=n_micro,
        tokens=batch_rows * seq_len,
        flops=model.flops_per_token((seq_len + 1) / 2) * batch_rows * seq_len / parallel.world,
        memory=({} if parallel.cpu_offload else state) | _memory(model, parallel, held, tokens, n_micro, recompute),
        sent=_sent(model, parallel, held, tokens, n_micro, recompute),
        bubble=(parallel.pp - 1) / (n_micro * parallel.pp_chunks + parallel.pp - 1),
        host=state if parallel.cpu_offload else {},
    )


def moment_bytes(optimizer: Optimizer, in_blocks: int, others: int) -> int:
    """Bytes of an optimizer's moments of parameters inside and outside the blocks."""
    if optimizer == "muon":  # one moment of a block's matrix, two of the rest
        return WIDE * in_blocks + 2 * WIDE * others
    n = in_blocks + others
    return 2 * n + 2 * WIDE * n // BLOCK if optimizer == "adamw8bit" else 2 * WIDE * n


def gradients_at_once(model: LlamaConfig) -> int:
    """Parameters whose gradients are there together when each is stepped in the backward: a block's, or a table's."""
    table = model.vocab_size * model.dim
    ends = model.dim + table * (1 if model.tied_embeddings else 2)
    return max(table, (model.n_params - ends) // model.n_layers)


@dataclass(frozen=True)
class _Held:
    """What the fullest process of the pipeline holds, before it is split further."""

    layers: int
    block: int  # parameters of a block
    ends: int  # parameters of embeddings, last norm and head

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.ends


def _fullest(model: LlamaConfig, parallel: ParallelConfig) -> _Held:
    runs = parallel.layers(model.n_layers)
    table = model.vocab_size * model.dim
    ends = model.dim + table * (1 if model.tied_embeddings else 2)
    block = (model.n_params - ends) // model.n_layers
    held = []
    for process in range(parallel.pp):
        mine = runs[process :: parallel.pp]
        first, last = mine[0].start == 0, mine[-1].stop == model.n_layers
        here = ends if first and last else table if first else table + model.dim if last else 0
        held.append(_Held(sum(map(len, mine)), block, here))
    return max(held, key=lambda h: h.parameters)


def _state(
    model: LlamaConfig, parallel: ParallelConfig, held: _Held, optimizer: Optimizer, in_backward: bool
) -> dict[str, int]:
    """A process's part of weights, gradients and moments."""
    parts = parallel.tp * parallel.dp_shard * parallel.cp
    part = -(-held.parameters // parts)
    others = held.ends // parts
    graded = min(part, gradients_at_once(model) // parts) if in_backward else part
    return {
        "weights, fp32": WIDE * part,
        "gradients, fp32": WIDE * graded,
        MOMENTS[optimizer]: moment_bytes(optimizer, part - others, others),
    }


def _memory(
    model: LlamaConfig, parallel: ParallelConfig, held: _Held, tokens: int, n_micro: int, recompute: Recompute
) -> dict[str, int]:
    """The rest: what comes and goes."""
    own = held.parameters // parallel.tp
    # Without a pipeline only the block at work and the next are whole, and the ends; in one, all blocks are. A process
    # alone casts each weight as it is used, and keeps that for the backward pass unless the block is run again.
    whole = own if parallel.pp > 1 else (min(2, held.layers) * held.block + held.ends) // parallel.tp
    waits = n_micro > 1 and not parallel.reduce_every  # gradients wait whole for the last micro-batch
    alone = parallel.world == 1 and not parallel.cpu_offload
    parts = {
        "weights gathered or cast, bf16": NARROW * (own if alone and recompute == "none" else whole),
        "gradients not yet reduced, fp32": 0 if alone else WIDE * (own if waits else whole),
        "activations": NARROW * tokens * kept(model, parallel, held.layers, n_micro, recompute),
        "a chunk of logits, fp32": 2 * WIDE * CHUNK * model.vocab_size // parallel.tp,
    }
    return {part: size for part, size in parts.items() if size}


def kept(model: LlamaConfig, parallel: ParallelConfig, layers: int, n_micro: int, recompute: Recompute) -> int:
    """Values kept a token for the backward pass, over all layers and the micro-batches in flight, and one block's own.

    Of a block: norms' and matrices' inputs and outputs. The two that tensor parallelism gathers, or has yet to sum,
    are whole on each process; all else is split.
    """
    heads = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    # residual stream, norms and attention 4 D, matrices' inputs 2 D, q, k, v, and gate, up and their product 3 F
    everything = 2 * model.dim + (4 * model.dim + heads + 3 * model.ffn_dim) // parallel.tp
    costly = 2 * model.dim + (model.dim + heads + model.n_heads * model.head_dim + 2 * model.ffn_dim) // parallel.tp
    block = {"none": everything, "selective": costly, "full": model.dim // parallel.tp}[recompute]
    p, v = parallel.pp, parallel.pp_chunks
    runs = min(n_micro * v, p if v == 1 else (v - 1) * p + 2 * (p - 1) + 1)  # runs of layers in flight, of v here
    again = 0 if recompute == "none" else everything  # of the block that is being recomputed
    return layers * block * runs // v + again


def _sent(
    model: LlamaConfig, parallel: ParallelConfig, held: _Held, tokens: int, n_micro: int, recompute: Recompute
) -> dict[str, int]:
    own, shards = held.parameters // parallel.tp, parallel.dp_shard * parallel.cp
    blocks = held.layers * held.block // parallel.tp
    passes = 3 if recompute == "full" else 2  # forward, backward, and forward again
    hidden = NARROW * tokens * model.dim
    keys = NARROW * tokens * parallel.cp * 2 * model.n_kv_heads * model.head_dim // parallel.tp
    # Without a pipeline blocks are gathered forward and backward, the ends once; in one, everything once a step.
    gathers = own if parallel.pp > 1 else n_micro * (2 * blocks + held.ends // parallel.tp)
    reductions = n_micro if parallel.reduce_every else 1
    tied = model.tied_embeddings and parallel.pp > 1  # its gradient goes from either end of the pipeline to the other
    copied = WIDE * model.vocab_size * model.dim // parallel.tp // shards if tied else 0
    ring = lambda size, n: size * (n - 1) // n  # noqa: E731 - a formula
    parts = {
        "tp (activations)": n_micro * held.layers * passes * 4 * ring(hidden, parallel.tp),
        "cp (keys and values)": n_micro * held.layers * passes * ring(keys, parallel.cp),
        "pp (hidden states)": 0 if parallel.pp == 1 else n_micro * parallel.pp_chunks * 2 * hidden // parallel.tp,
        "pp (gradients of tied embeddings)": copied,
        "dp_shard and cp (weights, gradients)": ring(NARROW * gathers + WIDE * own * reductions, shards),
        "dp_replicate (gradients)": 2 * ring(WIDE * own // shards * reductions, parallel.dp_replicate),
    }
    return {part: size for part, size in parts.items() if size}
