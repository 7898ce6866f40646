"""GGUF in and out: the one-file format of llama.cpp, for Llama and Qwen3.

The header is read by gguf_header.py; number formats are the gguf package's, which dequantises every type of
llama.cpp. Tensors are read one at a time, dequantised to fp32 where quantised, and q and k of a Llama are reordered
(llama.cpp rotates adjacent pairs there; in Qwen3 halves, as Hugging Face does in both).
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import gcd, prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from arriero.checkpoint.beside import NOTHING, Beside
from arriero.checkpoint.gguf_blocks import KINDS, fits, packed, unpacked
from arriero.checkpoint.gguf_rope import ROPE_FREQS, read_scaling, rope_factors, scaling_entries, shortest
from arriero.checkpoint.tensor_file import Entry
from arriero.checkpoint.weights import Weights, check_sizes, opened, rotary_heads, to_halves, to_pairs
from arriero.errors import CheckpointError
from arriero.io.fields import Fields, shown
from arriero.io.files import replaced_file
from arriero.io.gguf_header import read_header, read_metadata
from arriero.model.config import ARCHITECTURES, LlamaConfig
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.model.scaling import Llama3Scaling
from arriero.quant.packed import Quantized
from arriero.show.terminal import warn_once

Kind = gguf.GGMLQuantizationType

_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_ARRAYS = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: np.uint16}  # NumPy has no bf16
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Kind.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}
_READABLE = {*_PLAIN, *gguf.quants._type_traits}  # the quantised types that the package can dequantise

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QK_NORM_NAMES = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_TOP_NAMES = {EMBEDDINGS: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}


@dataclass(frozen=True)
class Layout:
    """How llama.cpp stores an architecture."""

    block_names: Mapping[str, str]  # Hugging Face's -> GGUF's, within a layer
    pairs: bool  # RoPE turns adjacent pairs, so that the rows of q and k are reordered
    rope_scaling: bool  # by factors in a `rope_freqs` tensor


_LAYOUTS = {
    "llama": Layout(_BLOCK_NAMES, pairs=True, rope_scaling=True),
    "qwen3": Layout(_BLOCK_NAMES | _QK_NORM_NAMES, pairs=False, rope_scaling=False),
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file: its shape in PyTorch's order, its type, and where its bytes begin and how many."""

    shape: tuple[int, ...]
    kind: Kind
    start: int
    size: int


def read_config(file: Path) -> LlamaConfig:
    """The shape of the model in a GGUF file, Llama 3.1's RoPE scaling recovered from its `rope_freqs` tensor."""
    metadata, stored = read_metadata(file), _stored(file)
    arch = metadata.get("general.architecture")
    if arch not in tuple(ARCHITECTURES):
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{file}: architecture is {shown(arch)}; Arriero's decoders compute {known} only")
    prefix = f"{arch}."
    entries = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if per_layer := [key for key, value in entries.items() if isinstance(value, list)]:
        raise CheckpointError(f"{file}: '{prefix}{per_layer[0]}' differs between layers; {arch}'s layers are all alike")
    fields = Fields(entries, str(file), arch)
    if fields.get("expert_count", 0):
        raise CheckpointError(f"{file}: a mixture of {fields['expert_count']} experts; Llama's feed-forward is dense")
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{file}: it holds no token_embd.weight; it is no language model, or one part of several")
    if len(stored["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{file}: token_embd.weight is {list(stored['token_embd.weight'].shape)}, no matrix")
    vocab_size, dim = stored["token_embd.weight"].shape
    if fields.get("vocab_size", vocab_size) != vocab_size:
        said = shown(fields["vocab_size"])
        warn_once(f"{file}: {prefix}vocab_size is {said}, its embeddings have {vocab_size:,} rows: the rows are taken")
    n_heads, turned = fields.whole("attention.head_count"), fields.get("rope.dimension_count")
    head_dim = fields.whole("attention.key_length", turned or dim // n_heads or 1)
    if turned not in (None, head_dim):
        raise CheckpointError(f"{file}: RoPE turns {shown(turned)} of {head_dim} dimensions; Llama all")
    factors = None if ROPE_FREQS not in stored else _tensor(file, stored[ROPE_FREQS]).float()
    with fields.blamed():
        config = ARCHITECTURES[arch](
            dim=dim,
            n_layers=fields.whole("block_count"),
            n_heads=n_heads,
            n_kv_heads=fields.whole("attention.head_count_kv", n_heads),
            ffn_dim=fields.whole("feed_forward_length"),
            vocab_size=vocab_size,
            max_context=fields.whole("context_length"),
            norm_eps=shortest(fields.number("attention.layer_norm_rms_epsilon")),
            rope_theta=shortest(fields.number("rope.freq_base", 10_000.0)),
            tied_embeddings="output.weight" not in stored,
            head_dim=head_dim,
        )
        check_sizes(file, config, {name: tensor.shape for name, tensor in stored.items()}, "blk.")
        return replace(config, rope_scaling=read_scaling(fields, config, factors))


def open_gguf(file: Path) -> Weights:
    """Open a GGUF file; tensors are read, dequantised and put in Hugging Face's order when asked for."""
    stored = _stored(file)
    config = read_config(file)
    hf_names = {name: hf for hf, name in tensor_names(config).items()}
    entries = {
        hf_names.get(name, name): Entry(tensor.shape, _PLAIN.get(tensor.kind, torch.float32))
        for name, tensor in stored.items()
        if name != ROPE_FREQS
    }

    def read(name: str) -> Tensor:
        tensor = stored[tensor_names(config)[name]]
        array = _tensor(file, tensor)
        heads = paired_heads(name, config)
        return to_halves(array, heads) if heads else array

    def codes(name: str) -> Quantized | None:
        found = tensor_names(config)[name]
        if found not in stored or (tensor := stored[found]).kind in _PLAIN:
            return None
        matrix, heads = unpacked(_raw(file, tensor), tensor.kind, tensor.shape), paired_heads(name, config)
        if matrix is None or not heads:
            return matrix
        return matrix.take(to_halves(torch.arange(matrix.shape[0])[:, None], heads)[:, 0])

    return opened(file, config, entries, read, packed=codes)


def write_gguf(
    weights: Weights,
    file: Path,
    *,
    kind: Kind,
    tokenizer: Mapping[str, Any],
    name: str = "",
    beside: Beside = NOTHING,
    kinds: Mapping[str, str] = {},
    progress: Callable[[str], None] = lambda name: None,
    check: Callable[[Path], None] = lambda file: None,
) -> None:
    """Write weights as one GGUF file, all or nothing; one tensor is in memory at a time.

    kind: F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_0 or Q4_1, for the matrices; norms and RoPE factors stay F32, as
    llama.cpp wants them. kinds: matrices that are packed as `weights.packed` gives them, exactly (gguf_blocks.py).
    tokenizer: its metadata (`tokenizer.gguf.tokenizer_to_gguf`). name: shown by llama.cpp as the model's name. beside,
    progress, check: as in `write_hf`.
    Raises `CheckpointError` when a weight is too large for F16, or a row cannot be cut into blocks of 32.
    """
    config = weights.config
    scaling = scaling_entries(weights.source, config, _LAYOUTS[config.model_type].rope_scaling)
    stated = dict(beside.general) | beside.sampling_metadata(weights.source)
    with replaced_file(file) as temporary:
        with closing(gguf.GGUFWriter(temporary, config.model_type)) as writer:
            of_tensors = _kinds(weights, kind, kinds)
            most = Counter(found for hf, found in of_tensors.items() if len(weights.entries[hf].shape) > 1)
            described = _metadata(config, most.most_common(1)[0][0], name)
            for key, value in {**described, **scaling, **stated, **tokenizer}.items():
                _add(writer, key, value)
            _write_tensors(writer, weights, of_tensors, kinds, progress)
        check(temporary)


def _kinds(weights: Weights, kind: Kind, kinds: Mapping[str, str]) -> dict[str, Kind]:
    """The type of each tensor."""
    return {
        name: KINDS[kinds[name]] if name in kinds else kind if len(entry.shape) > 1 else Kind.F32
        for name, entry in weights.entries.items()
    }


def _write_tensors(
    writer: gguf.GGUFWriter,
    weights: Weights,
    kinds: Mapping[str, Kind],
    exact: Collection[str],
    progress: Callable[[str], None],
) -> None:
    """Write the header and, after it, each tensor; exact: those whose codes and scales are given."""
    config = weights.config
    by_table = isinstance(config.rope_scaling, Llama3Scaling)
    factors = rope_factors(config).numpy()
    if by_table:
        writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes, Kind.F32)
    for hf, entry in weights.entries.items():
        shape, dtype = _stored_shape(weights.source, hf, entry.shape, kinds[hf])
        writer.add_tensor_info(tensor_names(config)[hf], shape, dtype, prod(shape) * dtype.itemsize, kinds[hf])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if by_table:
        writer.write_tensor_data(factors)
    for hf in weights.entries:
        progress(hf)
        heads = paired_heads(hf, config)
        if hf in exact:
            writer.write_tensor_data(_exactly(weights, hf, heads))
            continue
        tensor = to_pairs(weights.read(hf), heads) if heads else weights.read(hf)
        writer.write_tensor_data(_encoded(weights.source, hf, tensor, kinds[hf]))


def _exactly(weights: Weights, name: str, heads: int | None) -> np.ndarray:
    """The bytes of a matrix whose codes and scales were chosen."""
    matrix = weights.packed(name)
    assert matrix is not None and fits(matrix), name
    return packed(matrix.take(to_pairs(torch.arange(matrix.shape[0])[:, None], heads)[:, 0]) if heads else matrix)


def _metadata(config: LlamaConfig, kind: Kind, name: str) -> dict[str, Any]:
    """The entries that describe the shape, under llama.cpp's keys."""
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    general = {
        "general.name": name or "Llama",
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return general | {f"{config.model_type}.{key}": value for key, value in shape.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a plain value under the type that llama.cpp expects: u32 (below 0 i32), f32, bool, string or an array."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _stored_shape(source: Path, name: str, shape: tuple[int, ...], kind: Kind) -> tuple[tuple[int, ...], np.dtype]:
    """The array that `_encoded` makes of a tensor: its shape and element type."""
    if kind in _PLAIN:
        return shape, np.dtype(_ARRAYS[kind])
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise CheckpointError(
            f"{source}: {name} has rows of {shape[-1]}; {kind.name} needs multiples of {block}: write F16, BF16 or F32"
        )
    return gguf.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8)


def _encoded(source: Path, name: str, tensor: Tensor, kind: Kind) -> np.ndarray:
    if kind not in _PLAIN:
        return gguf.quants.quantize(tensor.float().numpy(), kind)
    cast = tensor.to("cpu", _PLAIN[kind]).contiguous()
    if kind is Kind.F16 and not bool(cast.isfinite().all()):
        raise CheckpointError(f"{source}: {name} holds weights beyond F16's 65,504; write BF16 or F32")
    return (cast.view(torch.uint16) if kind is Kind.BF16 else cast).numpy()


@functools.lru_cache(maxsize=8)
def tensor_names(config: LlamaConfig) -> dict[str, str]:
    """Hugging Face name -> GGUF name, of every tensor of a model of this shape."""
    names = dict(_TOP_NAMES)
    for layer in range(config.n_layers):
        for hf, name in _LAYOUTS[config.model_type].block_names.items():
            names[f"model.layers.{layer}.{hf}.weight"] = f"blk.{layer}.{name}.weight"
    return names


def paired_heads(name: str, config: LlamaConfig) -> int | None:
    """Heads of a tensor (q or k) whose rows llama.cpp turns in adjacent pairs, None for every other tensor."""
    return rotary_heads(name, config) if _LAYOUTS[config.model_type].pairs else None


def _stored(file: Path) -> dict[str, Stored]:
    """The tensors of a GGUF file, each of a type that can be read, wholly in the file, apart from the others."""
    header = read_header(file)
    stored = {}
    for name, info in header.tensors.items():
        if info.kind not in _READABLE:
            raise CheckpointError(
                f"{file}: tensor {name} has type {info.kind}, which the gguf package cannot dequantise"
            )
        kind = Kind(info.kind)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if (info.shape or (1,))[-1] % per_block:
            raise CheckpointError(
                f"{file}: tensor {name} is {list(info.shape)}, and its type {kind.name} has blocks of {per_block} in a "
                "row; copy or download it again"
            )
        stored[name] = Stored(info.shape, kind, info.start, prod(info.shape) // per_block * block_bytes)
        if info.start + stored[name].size > header.size:
            raise CheckpointError(f"{file}: cut short: tensor {name} reaches past its end; copy or download it again")
    in_order = sorted(stored.items(), key=lambda item: item[1].start)
    for (before, first), (after, second) in itertools.pairwise(in_order):
        if first.start + first.size > second.start:
            raise CheckpointError(f"{file}: the tensors {before} and {after} overlap; copy or download it again")
    return stored


def _tensor(file: Path, tensor: Stored) -> Tensor:
    """One tensor in memory of its own; of quantised types as fp32."""
    array = torch.from_numpy(_read(file, tensor))
    return array.view(torch.bfloat16) if tensor.kind is Kind.BF16 else array


AT_ONCE = 4096  # values in a row given to gguf, which takes 16 at a time: with rows of 576 that takes 1.5 times as long


def _raw(file: Path, tensor: Stored) -> np.ndarray:
    """The bytes of one tensor."""
    return np.fromfile(file, dtype=np.uint8, count=tensor.size, offset=tensor.start)


def _read(file: Path, tensor: Stored) -> np.ndarray:
    """One tensor as an array of its own; BF16 as uint16, quantised types as fp32."""
    raw = _raw(file, tensor)
    if tensor.kind in _PLAIN:
        return raw.view(_ARRAYS[tensor.kind]).reshape(tensor.shape)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    row = max(tensor.shape[-1] // per_block, gcd(tensor.size // block_bytes, AT_ONCE // per_block))
    values = gguf.quants.dequantize(raw.reshape(-1, row * block_bytes), tensor.kind)
    return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)
