"""Tensor and sequence parallelism: every matrix, and the sequence between them, split over the tp processes.

A block's first matrices are split by columns (q, k, v by heads; gate, up by width) and its last by rows (o, down), so
each half block needs one gather of the sequence before it and one reduce-scatter after it (arXiv 1909.08053, and
2205.05198 for the sequence). Embeddings and head are split by vocabulary; the loss never gathers logits (losses/lm.py).
Price for each block, forward and backward: four times a gather and a reduce-scatter of T x D values.

Of an adapter, B is split by columns or A by rows, as its matrix is; the other, small one is replicated.
Built on torch's DTensor and its parallel styles. Shapes: T tokens, D model width.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from arriero.model.linear import Linear
from arriero.model.llama import Llama
from arriero.model.qwen3 import Qwen3

SEQUENCE = Shard(1)
HEAD_NORMS = ("q_norm", "k_norm")  # replicated; each process's gradient is from its own heads


def split_matrices(model: Llama, mesh: DeviceMesh) -> None:
    """Split this process's modules of `model` over `mesh`, in place. Nothing is sent: each process keeps its shard.

    Afterwards the decoder takes all tokens and returns hidden states of all of them, or between pipeline stages those
    of this process's part of the sequence; `model.head.weight` is a DTensor for `chunked_cross_entropy`.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    styles = block_styles(isinstance(model, Qwen3))
    for layer in model.model.layers:
        if _has_parameters(layer):
            parallelize_module(layer, mesh, styles, src_data_rank=None)
    has_embeddings = isinstance(model.model.embed_tokens, nn.Embedding)
    if has_embeddings:
        style = Embeddings(input_layouts=Replicate(), output_layouts=SEQUENCE)
        parallelize_module(model.model.embed_tokens, mesh, style, src_data_rank=None)
    if _has_parameters(model.head):
        parallelize_module(model.model.norm, mesh, WholeNorm(), src_data_rank=None)
        if model.tied and has_embeddings:
            model.tie_weights()
        else:
            _distribute(model.head, mesh, Shard(0))
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)  # torch's styles do not all keep frozen what was


def block_styles(head_norms: bool) -> dict[str, ParallelStyle]:
    """How each module of a block is split, by its name. head_norms: the block has norms of queries and keys."""
    attention = ("q_proj", "k_proj", "v_proj"), "o_proj"
    feed_forward = ("gate_proj", "up_proj"), "down_proj"
    block: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(input_layouts=(SEQUENCE,), desired_input_layouts=(Replicate(),)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(SEQUENCE,), desired_input_layouts=(Replicate(),)),
    }
    for name, (columns, rows) in {"self_attn": attention, "mlp": feed_forward}.items():
        block |= {f"{name}.{column}": Columns() for column in columns}
        block[f"{name}.{rows}"] = Rows(output_layouts=SEQUENCE)
    if head_norms:
        block |= {f"self_attn.{norm}": SequenceParallel(sequence_dim=2, use_local_output=True) for norm in HEAD_NORMS}
    return block


def _has_parameters(module: nn.Module) -> bool:
    """Whether a module is of this pipeline stage, and no pass-through."""
    return any(True for _ in module.parameters())


class Columns(ColwiseParallel):
    """A linear split by output; an adapter's A is replicated, its B split like the matrix."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _split(self, module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, Linear):
            _distribute(module, device_mesh, Replicate() if name.startswith("lora_A") else Shard(0))


class Rows(RowwiseParallel):
    """A linear split by input; an adapter's A is split like the matrix, its B replicated."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.desired_input_layouts: tuple[Placement, ...] = (Shard(-1),)
        return _split(self, module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, Linear):
            _distribute(module, device_mesh, Replicate() if name.startswith("lora_B") else Shard(1))


def _split(style: Columns | Rows, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """What torch's styles do for `nn.Linear`, for whatever stands in a linear's place."""
    given = functools.partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts)
    made = functools.partial(style._prepare_output_fn, style.output_layouts, style.use_local_output)
    return distribute_module(module, mesh, style._partition_linear_fn, given, made)


class Embeddings(RowwiseParallel):
    """Embeddings split by vocabulary. The output is synchronous: compiled code loses an asynchronous one's gradient."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Tensor:
        assert isinstance(outputs, DTensor)
        return outputs.redistribute(placements=output_layouts).to_local()


class WholeNorm(SequenceParallel):
    """The last norm: computed on a part of the sequence and gathered, for a loss that is split by vocabulary.

    Each process's gradient then comes from its part of the vocabulary only, so the parts are summed on the way back.
    """

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh) -> Tensor:
        assert isinstance(outputs, DTensor)
        return outputs.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    whole = module.weight
    assert isinstance(whole, nn.Parameter)
    split = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
    module.register_parameter("weight", nn.Parameter(split, requires_grad=whole.requires_grad))
