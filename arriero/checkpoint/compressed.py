"""Quantised matrices in a Hugging Face directory: compressed-tensors' layout, which transformers and vLLM open.

config.json says in `quantization_config` which linears are quantised and how; a matrix X is then several tensors:

    int4  X.weight_packed int32 [O, I/8] (input i at bit 4 (i mod 8) of its word, stored as code + 8),
          X.weight_scale [O, G], X.weight_shape int64 [2]
    int8  the same with four codes + 128 to a word, and G = 1
    nf4   X.weight_packed uint8 [O, I/2], X.weight_scale fp32 [O, I/64]: Arriero's own, which others refuse by name

Only weights are declared quantised. ("int-quantized" has int8 as it is, but vLLM takes it with activations rounded
token by token only, which costs SmolLM2-135M a KL divergence of 0.06: docs/log.md.) Read besides: "int-quantized",
groups of any width, zero points, GPTQ and AWQ (gptq.py). What else there is (FP8, bitsandbytes) is refused by name.
Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.checkpoint.gptq import METHODS, check_gptq, gptq_matrices, is_part, read_gptq
from arriero.checkpoint.tensor_file import Entry, Reader
from arriero.errors import CheckpointError
from arriero.io.fields import Fields, shown
from arriero.quant.packed import BITS, Quantized

CONFIG = "quantization_config"
OURS = "arriero-nf4"
INTEGERS = ("I8", "I32", "I64", "U8")  # types of the tensors of a quantised matrix, besides floats
_FORMATS = ("pack-quantized", "int-quantized", "mixed-precision")
_REMEDIES = {
    "bitsandbytes": "load it in transformers, call model.dequantize() and save that",
    "fp8": "take the model's bf16 version, or dequantise it with the code that its publisher gives",
    "mxfp4": "take the model's bf16 version",
}


def quantization_of(config: Mapping[str, Any], file: str) -> str:
    """The method by which config.json says that weights are quantised, "" for none; raises for what is not read.

    Raises `CheckpointError` naming method and remedy.
    """
    fields = Fields(config, file)
    if not fields.get(CONFIG):
        return ""
    group = fields.group(CONFIG)
    method = group.get("quant_method", "unknown")
    if method == OURS:
        return OURS
    if method in METHODS:
        return check_gptq(group, str(method))
    if method != "compressed-tensors":
        remedy = _REMEDIES.get(str(method).lower(), "take a GGUF file of the model, or its unquantised version")
        raise CheckpointError(
            f"{file}: {CONFIG} says that the weights are quantised by method {shown(method)}; read are "
            f"compressed-tensors (int4 and int8), GPTQ and AWQ (4 bits), and GGUF files: {remedy}"
        )
    _check_compressed(group)
    return str(method)


def _check_compressed(group: Fields) -> None:
    """Refuse what compressed-tensors can express and is not computed here."""
    schemes = group.group("config_groups")
    for name in schemes:
        scheme = schemes.group(name)
        format_ = scheme.get("format", group.get("format"))
        weights = scheme.group("weights")
        if weights and (weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8)):
            bits = f"{shown(weights.get('type'))} of {shown(weights.get('num_bits'))} bits"
            raise CheckpointError(
                f"{group.file}: {CONFIG} holds weights as {bits}; read are integers of 4 and 8 bits: take the model's "
                "bf16 version, or one quantised to int4 or int8"
            )
        if format_ not in _FORMATS:
            raise CheckpointError(
                f"{group.file}: {CONFIG} has the format {shown(format_)}; read are {', '.join(_FORMATS)}: take the "
                "model's bf16 version, or a GGUF file of it"
            )
        if weights.get("actorder") in ("group", "dynamic"):
            raise CheckpointError(
                f"{group.file}: {CONFIG} has groups of inputs in another order (actorder); groups are read in the "
                "order of the inputs only: take a version with actorder 'static', or the model's bf16 version"
            )


def quantization_config(kinds: Mapping[str, str], linears: Collection[str]) -> dict[str, Any]:
    """The entry of config.json for matrices held as `kinds` (name of the linear -> kind) among all `linears`."""
    if "nf4" in kinds.values():
        return {"quant_method": OURS, "group_size": 64, "linears": sorted(kinds)}
    used = sorted(set(kinds.values()))
    plain = sorted(set(linears) - kinds.keys())
    groups = {
        f"group_{i}": _scheme(kind, ["Linear"] if len(used) == 1 else [n for n, k in kinds.items() if k == kind])
        for i, kind in enumerate(used)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": groups["group_0"]["format"] if len(used) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(kind: str, targets: list[str]) -> dict[str, Any]:
    if kind == "int4":
        own = {"num_bits": 4, "strategy": "group", "group_size": 32}
    else:
        own = {"num_bits": 8, "strategy": "channel"}
    weights = {**own, "type": "int", "symmetric": True, "dynamic": False}
    return {"targets": targets, "weights": weights, "input_activations": None, "format": "pack-quantized"}


def stored_entries(linear: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> dict[str, Entry]:
    """The tensors of a matrix of `shape` in a file: name -> shape and type. dtype: of int4's and int8's scales."""
    n_out, n_in = shape
    if kind == "nf4":
        return {
            f"{linear}.weight_packed": Entry((n_out, n_in // 2), torch.uint8),
            f"{linear}.weight_scale": Entry((n_out, n_in // 64), torch.float32),
        }
    return {
        f"{linear}.weight_packed": Entry((n_out, -(-n_in * BITS[kind] // 32)), torch.int32),
        f"{linear}.weight_scale": Entry((n_out, n_in // 32 if kind == "int4" else 1), dtype),
        f"{linear}.weight_shape": Entry((2,), torch.int64),
    }


def stored_tensor(matrix: Quantized, suffix: str) -> Tensor:
    """One tensor of a matrix as `stored_entries` has it, by the end of its name ("weight_scale")."""
    if suffix == "weight_scale":
        return matrix.scales
    if suffix == "weight_shape":
        return torch.tensor(matrix.shape)
    if matrix.kind == "nf4":
        return matrix.codes
    codes = matrix.codes.view(torch.uint8)
    codes = codes if matrix.kind == "int4" else codes ^ 128
    return F.pad(codes, (0, -codes.shape[1] % 4)).contiguous().view(torch.int32)


Packed = Callable[[str, int, int | None], Quantized | None]
"""(name, start, stop) -> rows of a matrix in its codes; None for a tensor that is dense."""


def open_compressed(
    directory: Path, method: str, entries: Mapping[str, Entry], readers: Mapping[str, Reader]
) -> tuple[dict[str, Entry], Packed]:
    """What a quantised directory holds as if it were dense, and how to read its matrices in codes.

    Raises `CheckpointError` where the tensors of a matrix do not fit together.
    """
    if method in ("gptq", "gptq_v2", "awq"):
        return _open_gptq(directory, method, entries, readers)
    found = dict(_matrices(directory, method, entries, readers))
    parts = {f"{name.removesuffix('.weight')}.{suffix}" for name in found for suffix in _SUFFIXES}
    dense = {name: entry for name, entry in entries.items() if name not in parts}
    if wrong := [name for name, entry in dense.items() if not entry.dtype.is_floating_point]:
        raise CheckpointError(f"{directory}: {wrong[0]} holds integers, and no scale belongs to it; copy it again")

    def packed(name: str, start: int = 0, stop: int | None = None) -> Quantized | None:
        matrix = found.get(name)
        return None if matrix is None else matrix.read(readers, start, stop)

    logical = {name: Entry(matrix.shape, torch.float32) for name, matrix in found.items()}
    return dense | logical, packed


def _open_gptq(
    directory: Path, variant: str, entries: Mapping[str, Entry], readers: Mapping[str, Reader]
) -> tuple[dict[str, Entry], Packed]:
    shapes = gptq_matrices(directory, entries)
    dense = {name: entry for name, entry in entries.items() if not is_part(name, shapes)}

    def packed(name: str, start: int = 0, stop: int | None = None) -> Quantized | None:
        if name not in shapes:
            return None
        matrix = read_gptq(directory, name, shapes[name], variant, readers)
        return matrix.rows(start, matrix.shape[0] if stop is None else stop)

    return dense | {name: Entry(shape, torch.float32) for name, shape in shapes.items()}, packed


_SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@dataclass(frozen=True)
class _Matrix:
    """Where a quantised matrix lies: the names of its tensors."""

    linear: str
    kind: str
    bits: int
    shape: tuple[int, int]
    packed: bool
    zero_points: bool

    def read(self, readers: Mapping[str, Reader], start: int, stop: int | None) -> Quantized:
        def part(suffix: str, start: int = 0, stop: int | None = None) -> Tensor:
            name = f"{self.linear}.{suffix}"
            return readers[name](name, start, stop)

        codes = part("weight_packed" if self.packed else "weight", start, stop)
        scales = part("weight_scale")
        scales = scales.float().view(len(scales), -1).expand(self.shape[0], -1)[start:stop].contiguous()
        if self.kind == "nf4":
            return Quantized("nf4", codes, scales)
        if self.bits == 8:
            if self.packed:
                codes = (codes.view(torch.uint8)[:, : self.shape[1]] ^ 128).view(torch.int8)
            return Quantized("int8", codes, scales)
        codes = codes.view(torch.uint8)[:, : self.shape[1] // 2]
        if not self.zero_points:
            return Quantized("int4", codes, scales)
        zeros = part("weight_zero_point")  # int32 [O/8, G]: eight rows to a word
        zeros = torch.stack([zeros >> 4 * i & 15 for i in range(8)], dim=1).view(-1, zeros.shape[1])[start:stop]
        return Quantized("int4-affine", codes, scales, -zeros * scales)


def _matrices(
    directory: Path, method: str, entries: Mapping[str, Entry], readers: Mapping[str, Reader]
) -> Iterator[tuple[str, _Matrix]]:
    for name, entry in entries.items():
        linear, _, suffix = name.rpartition(".")
        if suffix not in ("weight_packed", "weight") or f"{linear}.weight_scale" not in entries:
            continue
        scale, packed = entries[f"{linear}.weight_scale"], suffix == "weight_packed"
        zero_points = f"{linear}.weight_zero_point" in entries
        shape = _shape(directory, linear, entry, packed and method != OURS, entries, readers)
        bits = 8 if entry.shape[1] * entry.dtype.itemsize >= shape[1] else 4
        kind = "nf4" if method == OURS else "int8" if bits == 8 else "int4-affine" if zero_points else "int4"
        n_groups = scale.shape[1] if len(scale.shape) == 2 else 1
        fits = (
            bits == BITS[kind]
            and entry.dtype is (torch.uint8 if method == OURS else torch.int32 if packed else torch.int8)
            and entry.shape[1] == -(-shape[1] * bits // (entry.dtype.itemsize * 8))
            and (bits == 8 or shape[1] % 2 == 0)
            and len(scale.shape) in (1, 2)
            and scale.shape[0] in (1, shape[0])
            and shape[1] % n_groups == 0
            and scale.dtype.is_floating_point
        )
        if zero_points:
            zeros = entries[f"{linear}.weight_zero_point"]
            fits = fits and bits == 4 and (zeros.dtype, zeros.shape) == (torch.int32, (-(-shape[0] // 8), n_groups))
        if not fits:
            raise CheckpointError(
                f"{directory}: {name} is {entry.dtype} {list(entry.shape)} with scales {list(scale.shape)}, which is "
                "no matrix in 4 or 8 bits that is read here; copy or download the model again, or take its bf16 version"
            )
        yield f"{linear}.weight", _Matrix(linear, kind, bits, shape, packed, zero_points)


def _shape(
    directory: Path,
    linear: str,
    entry: Entry,
    stated: bool,
    entries: Mapping[str, Entry],
    readers: Mapping[str, Reader],
) -> tuple[int, int]:
    """Outputs and inputs of a matrix: where codes are packed into words, by the tensor that states them."""
    if len(entry.shape) != 2 or entry.dtype.is_floating_point:
        raise CheckpointError(f"{directory}: {linear} has scales, and its codes are {entry.dtype} {list(entry.shape)}")
    if not stated:
        return entry.shape[0], entry.shape[1] * (2 if entry.dtype is torch.uint8 else 1)
    name = f"{linear}.weight_shape"
    if name not in entries or entries[name].shape != (2,) or entries[name].dtype not in (torch.int64, torch.int32):
        raise CheckpointError(f"{directory}: {name} is missing or holds no shape; copy or download the model again")
    n_out, n_in = readers[name](name).tolist()
    if n_out != entry.shape[0] or not 0 < n_in <= entry.shape[1] * 8:
        raise CheckpointError(
            f"{directory}: {name} says {[n_out, n_in]}, and its codes are {list(entry.shape)}; copy or download "
            "it again"
        )
    return n_out, n_in
