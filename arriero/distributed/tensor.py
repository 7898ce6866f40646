"""Tensor and sequence parallelism: every matrix, and the sequence between them, split over the tp processes.

A block's first matrices are split by columns (q, k, v by heads; gate, up by width) and its last by rows (o, down), so
each half block needs one gather of the sequence before it and one reduce-scatter after it (arXiv 1909.08053, and
2205.05198 for the sequence). Embeddings and head are split by vocabulary; the loss never gathers logits (losses/lm.py).
Price for each block, forward and backward: four times a gather and a reduce-scatter of T x D values.

Adapters follow their matrix: B is split by columns, or A by rows, and the small other one is whole everywhere.
Built on torch's DTensor and its parallel styles. Shapes: T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from arriero.model.llama import Llama
from arriero.model.qwen3 import Qwen3

SEQUENCE = Shard(1)
HEAD_NORMS = ("q_norm", "k_norm")  # whole everywhere, each process's gradient from its own heads


def split_matrices(model: Llama, mesh: DeviceMesh) -> None:
    """Split the parts of `model` that lie here over `mesh`, in place. No values are sent: each process keeps its share.

    Afterwards the decoder takes whole tokens and gives whole hidden states, or between pipeline stages the process's
    part of the sequence; `model.head.weight` is a DTensor for `chunked_cross_entropy`.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
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
    if isinstance(model, Qwen3):
        block |= {f"self_attn.{norm}": SequenceParallel(sequence_dim=2, use_local_output=True) for norm in HEAD_NORMS}
    for layer in model.model.layers:
        if any(True for _ in layer.parameters()):
            parallelize_module(layer, mesh, block, src_data_rank=None)
    here = isinstance(model.model.embed_tokens, nn.Embedding)
    if here:
        style = Embeddings(input_layouts=Replicate(), output_layouts=SEQUENCE)
        parallelize_module(model.model.embed_tokens, mesh, style, src_data_rank=None)
    if any(True for _ in model.head.parameters()):
        parallelize_module(model.model.norm, mesh, WholeNorm(), src_data_rank=None)
        if model.tied and here:
            model.tie_weights()
        else:
            _place(model.head, mesh, Shard(0))
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)  # torch's styles do not all keep frozen what was


class Columns(ColwiseParallel):
    """A linear split by output; an adapter's A is whole, its B split like the matrix."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _place(module, device_mesh, Replicate() if name == "lora_A" else Shard(0))


class Rows(RowwiseParallel):
    """A linear split by input; an adapter's A is split like the matrix, its B whole."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _place(module, device_mesh, Replicate() if name == "lora_B" else Shard(1))


class Embeddings(RowwiseParallel):
    """Embeddings split by vocabulary. Their output is waited for: compiled code would lose its gradient."""

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


def _place(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    whole = module.weight
    assert isinstance(whole, nn.Parameter)
    split = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
    module.register_parameter("weight", nn.Parameter(split, requires_grad=whole.requires_grad))
