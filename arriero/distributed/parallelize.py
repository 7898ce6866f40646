"""Applies all parallelism to a model from outside, in one function.

The order: pipeline stages, tensor and sequence parallelism, activation checkpointing, compilation of each block,
sharding of all parameters (FSDP2; HSDP where the shards are replicated), and last the values of the parameters that
this process then holds. The model's files have no code for it. A single process goes through the same function, which
then only applies checkpointing and compilation, and fills the parameters.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from arriero.distributed.config import Recompute
from arriero.distributed.materialise import Values, materialise
from arriero.distributed.mesh import Mesh
from arriero.distributed.stage import StageModel
from arriero.distributed.tensor import split_matrices
from arriero.model.llama import Block, Llama


def parallelize(
    model: Llama, mesh: Mesh, *, values: Values | None = None, recompute: Recompute = "none", compile: bool = False
) -> list[StageModel]:
    """Split `model` over `mesh`, in place; returns this process's stages, one for each of its ranges of layers.

    model: with adapters added and the compute type set; either on the meta device, and `values` then fill what each
    process holds, or with its weights, of which each process keeps its part. recompute, compile: as in `prepare`.
    Raises `ConfigError` where the model cannot be split so.
    """
    config = mesh.config
    config.check_model(model.config)
    layers = config.layers(model.config.n_layers)
    own = range(mesh.coordinate("pp"), len(layers), config.pp)
    stages = [StageModel(model, index, layers[index]) for index in own]
    for stage in stages:
        if config.tp > 1:
            split_matrices(stage.model, mesh.sub("tp"))
        prepare(stage.model, recompute=recompute, compile=compile)
        if mesh.distributed:
            shard(stage, mesh)
        if values is not None:
            materialise(stage, mesh.home, values)
    return stages


def prepare(model: Llama, *, recompute: Recompute = "none", compile: bool = False) -> Llama:
    """Apply activation checkpointing and per-block compilation in place; names of parameters stay as they are.

    recompute: "full" keeps only each block's input and recomputes the block in the backward pass (about a third more
    time); "selective" keeps the outputs of matmuls and attention too and recomputes what is cheap (Llama 1, arXiv
    2302.13971, section 2.4).
    compile: all blocks share one compiled graph, so the price is that of one block (about half a minute on a CPU).
    """
    for block in blocks(model):
        if recompute == "full":
            block.recompute()
        elif recompute == "selective":
            block.recompute(context_fn=_keep_costly)
        if compile:
            block.compile()
    return model


def blocks(model: Llama) -> list[Block]:
    """The blocks that this process has."""
    return [block for block in model.model.layers if isinstance(block, Block)]


def shard(stage: StageModel, mesh: Mesh) -> None:
    """Shard every parameter over the data-parallel processes, block by block; each block is gathered while it runs.

    Gathers are in the compute type, gradients are reduced in fp32 and summed, not averaged: losses are divided by the
    trained tokens of the whole global batch already. In a pipeline blocks stay gathered from forward to backward, since
    many micro-batches pass in between. With `cpu_offload` the shards are kept, and the optimizer runs, on the host.
    """
    dtype = stage.model.model.compute_dtype
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    over = mesh.sub("dp_replicate", "fsdp") if mesh.config.dp_replicate > 1 else mesh.sub("fsdp")
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if mesh.config.cpu_offload else OffloadPolicy()
    settings: dict[str, Any] = {"mesh": over, "mp_policy": precision, "offload_policy": offload}
    for block in blocks(stage.model):
        fully_shard(block, reshard_after_forward=mesh.config.pp == 1, **settings)
    fully_shard(stage, reshard_after_forward=False, **settings)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


_COSTLY = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.arriero.packed_attention_cpu.default,
}


def _keep_costly() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _COSTLY else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
