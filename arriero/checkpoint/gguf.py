"""GGUF in and out: the one-file format of llama.cpp (Llama architecture only).

A file is a header of typed key-value pairs (shape, tokenizer, chat template), a table of tensors and their bytes.
The header is parsed here: the gguf package's reader makes NumPy views of each of the 100,000 strings of a
vocabulary and takes seconds where this takes a tenth of one. Numbers are the gguf package's: it dequantises
every type of llama.cpp. Tensors are read one at a time, dequantised to fp32 where quantised, and q and k reordered
(llama.cpp rotates adjacent pairs).
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from arriero.checkpoint.files import replaced_file
from arriero.checkpoint.weights import (
    EMBEDDINGS,
    HEAD,
    Entry,
    Weights,
    checked,
    rotary_heads,
    to_halves,
    to_pairs,
)
from arriero.errors import CheckpointError
from arriero.model.config import LlamaConfig, RopeScaling
from arriero.model.rope import rope_frequencies

Kind = gguf.GGMLQuantizationType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_READABLE = {*_PLAIN, *gguf.quants._type_traits}
_ROPE_FREQS = "rope_freqs.weight"

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
_TOP_NAMES = {EMBEDDINGS: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file: its shape in PyTorch's order, its type, and where its bytes begin and how many."""

    shape: tuple[int, ...]
    kind: Kind
    start: int
    size: int


def read_metadata(file: Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file as plain Python values (arrays as lists).

    Raises `CheckpointError` when the file is not GGUF, of a version this does not read, or cut short.
    """
    return _header(file)[0]


def read_config(file: Path) -> LlamaConfig:
    """The shape of the model in a GGUF file, RoPE scaling recovered from its `rope_freqs` tensor."""
    metadata, stored = _header(file)
    arch = metadata.get("general.architecture")
    if arch != "llama":
        raise CheckpointError(f"{file}: architecture is {arch!r}; Arriero's decoder computes 'llama' only")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise CheckpointError(f"{file}: the entry 'llama.{key}' is missing from its metadata")
        if isinstance(value, list):
            raise CheckpointError(f"{file}: 'llama.{key}' differs between layers; Llama's layers are all alike")
        return value

    if get("expert_count", 0):
        raise CheckpointError(f"{file}: a mixture of {get('expert_count')} experts; Llama's feed-forward is dense")
    if get("rope.scaling.type", "none") != "none" and _ROPE_FREQS not in stored:
        raise CheckpointError(f"{file}: RoPE scaling {get('rope.scaling.type')!r}; known here is Llama 3.1's only")
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{file}: it holds no token_embd.weight; it is no language model, or one part of several")
    vocab_size, dim = stored["token_embd.weight"].shape
    n_heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("rope.dimension_count", dim // n_heads))
    if get("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{file}: RoPE turns {get('rope.dimension_count')} of {head_dim} dimensions; Llama all")
    config = LlamaConfig(
        dim=dim,
        n_layers=get("block_count"),
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        ffn_dim=get("feed_forward_length"),
        vocab_size=vocab_size,
        max_context=get("context_length"),
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(get("rope.freq_base", 10_000.0)),
        tied_embeddings="output.weight" not in stored,
        head_dim=head_dim,
    )
    if _ROPE_FREQS in stored:
        factors = torch.from_numpy(_read(file, stored[_ROPE_FREQS]))
        original = int(get("rope.scaling.original_context_length", 8192))
        config = replace(config, rope_scaling=_scaling_from_factors(file, config, factors, original))
    return config


def open_gguf(file: Path) -> Weights:
    """Open a GGUF file; tensors are read, dequantised and put in Hugging Face's order when asked for."""
    stored = _header(file)[1]
    config = read_config(file)
    hf_names = {name: hf for hf, name in tensor_names(config).items()}
    entries = {
        hf_names.get(name, name): Entry(tensor.shape, _PLAIN.get(tensor.kind, torch.float32))
        for name, tensor in stored.items()
        if name != _ROPE_FREQS
    }

    def read(name: str) -> Tensor:
        tensor = stored[tensor_names(config)[name]]
        array = torch.from_numpy(_read(file, tensor))
        if tensor.kind is Kind.BF16:
            array = array.view(torch.bfloat16)
        heads = rotary_heads(name, config)
        return to_halves(array, heads) if heads else array

    return checked(file, config, entries, read)


@functools.lru_cache(maxsize=8)
def tensor_names(config: LlamaConfig) -> dict[str, str]:
    """Hugging Face name -> GGUF name, of every tensor of a Llama."""
    names = dict(_TOP_NAMES)
    for layer in range(config.n_layers):
        for hf, name in _BLOCK_NAMES.items():
            names[f"model.layers.{layer}.{hf}.weight"] = f"blk.{layer}.{name}.weight"
    return names


def rope_factors(config: LlamaConfig) -> Tensor:
    """What llama.cpp divides each frequency by, fp32 [h/2]: unscaled over scaled frequencies."""
    return rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)


def _scaling_from_factors(file: Path, config: LlamaConfig, factors: Tensor, original: int) -> RopeScaling | None:
    """The scaling whose factors a `rope_freqs` tensor holds (None for all ones), checked against every one of them."""
    if bool((factors == 1).all()):
        return None
    scaling = RopeScaling(factor=float(factors.max()), original_context=original)
    expected = rope_factors(replace(config, rope_scaling=scaling))
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{file}: its rope_freqs are not those of Llama 3.1's scaling (low 1, high 4, original context {original}, "
            f"factor {scaling.factor:g})"
        )
    return scaling


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 is meant to be 1e-05."""
    return float(str(np.float32(value)))


def _read(file: Path, tensor: Stored) -> np.ndarray:
    """One tensor as an array of its own; BF16 as uint16, quantised types as fp32."""
    raw = np.fromfile(file, dtype=np.uint8, count=tensor.size, offset=tensor.start)
    if tensor.kind in _PLAIN:
        plain = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: np.uint16}[tensor.kind]
        return raw.view(plain).reshape(tensor.shape)
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
    return np.ascontiguousarray(gguf.quants.dequantize(raw.reshape(shape), tensor.kind), dtype=np.float32)


def _header(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    return _parse_header(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # config, tensors and tokenizer each ask for it
def _parse_header(file: Path, size: int, _mtime: int) -> tuple[dict[str, Any], dict[str, Stored]]:
    if size < 24:
        raise CheckpointError(f"{file}: {size} bytes are too few for a GGUF file")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        try:
            return _parse(file, cursor, size)
        except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{file}: damaged or cut short near byte {cursor.position} of {size}; copy or download it again"
            ) from error


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise IndexError
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data):
            raise IndexError
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind]}"
        values = list(struct.unpack_from(layout, self.data, self.position))
        self.position += struct.calcsize(layout)
        return values


def _parse(file: Path, cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, Stored]]:
    if cursor.scalar("I") != gguf.GGUF_MAGIC:
        raise CheckpointError(f"{file}: not a GGUF file (it does not begin with 'GGUF')")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(f"{file}: GGUF version {version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_pairs = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(n_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{file}: one of {metadata['split.count']} parts; join them with llama-gguf-split --merge"
        )
    table = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(n_dims)]))
        table.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    data_start = -(-cursor.position // alignment) * alignment
    stored = {}
    for name, shape, kind, offset in table:
        if kind not in _READABLE:
            raise CheckpointError(f"{file}: tensor {name} has type {kind}, which the gguf package cannot dequantise")
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[Kind(kind)]
        stored[name] = Stored(shape, Kind(kind), data_start + offset, prod(shape) // per_block * block_bytes)
        if stored[name].start + stored[name].size > size:
            raise CheckpointError(f"{file}: cut short: tensor {name} reaches past its end; copy or download it again")
    return metadata, stored
