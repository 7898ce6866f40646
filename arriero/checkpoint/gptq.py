"""Reads directories that GPTQ's and AWQ's tools wrote: 4-bit codes with zero points, eight to a word of 32 bits.

    GPTQ  X.qweight int32 [I/8, O] (input i at bit 4 (i mod 8) of its word), X.qzeros int32 [G, O/8], X.scales [G, O],
          X.g_idx int32 [I], the group of each input; w = scale (code - zero - 1), in "gptq_v2" scale (code - zero)
    AWQ   X.qweight int32 [I, O/8] ("gemm": outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight from the low bits on), X.qzeros
          int32 [G, O/8] likewise, X.scales [G, O]; w = scale (code - zero)

Inputs in another order than that of the file (g_idx of act-order) are refused: groups are runs of inputs here.
Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.tensor_file import Entry, Reader
from arriero.errors import CheckpointError
from arriero.io.fields import Fields, shown
from arriero.quant.packed import Quantized, from_indices

METHODS = ("gptq", "awq")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_SHIFTS = {"gptq": (0, 4, 8, 12, 16, 20, 24, 28), "awq": (0, 16, 4, 20, 8, 24, 12, 28)}


def check_gptq(group: Fields, method: str) -> str:
    """The variant that config.json states ("gptq", "gptq_v2" or "awq"); raises `CheckpointError` for others."""
    remedy = "take the model's bf16 version, or a GGUF file of it"
    if group.get("bits", 4) != 4:
        raise CheckpointError(f"{group.file}: {method} with {shown(group['bits'])} bits; read are 4: {remedy}")
    variant = group.get("checkpoint_format", "gptq") if method == "gptq" else group.get("version", "gemm")
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[method]
    if str(variant).lower() not in known:
        raise CheckpointError(
            f"{group.file}: {method} packed as {shown(variant)}; read is {' or '.join(known)}: {remedy}"
        )
    return str(variant).lower() if method == "gptq" else "awq"


def gptq_matrices(directory: Path, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each matrix, by the name that it would have as a dense one ("X.weight").

    Raises `CheckpointError` where its tensors do not fit together.
    """
    found = {}
    for name, entry in entries.items():
        linear, _, suffix = name.rpartition(".")
        if suffix != "qweight":
            continue
        scales, zeros = entries.get(f"{linear}.scales"), entries.get(f"{linear}.qzeros")
        fits = scales is not None and zeros is not None and len(entry.shape) == len(scales.shape) == 2
        if fits and scales is not None and zeros is not None:
            (rows, columns), (n_groups, n_out) = entry.shape, scales.shape
            n_in = rows if columns * 8 == n_out else rows * 8
            fits = (
                (rows, columns) in ((n_in, n_out // 8), (n_in // 8, n_out))
                and zeros.shape == (n_groups, n_out // 8)
                and n_out % 8 == 0
                and n_groups > 0
                and n_in % (2 * n_groups) == 0
                and entry.dtype is zeros.dtype is torch.int32
                and scales.dtype.is_floating_point
            )
        if not fits:
            raise CheckpointError(
                f"{directory}: {name} is {list(entry.shape)}, and the scales and zero points beside it do not fit; "
                "copy or download the model again"
            )
        found[f"{linear}.weight"] = n_out, n_in
    return found


def is_part(name: str, matrices: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a tensor is a part of one of the matrices."""
    linear, _, suffix = name.rpartition(".")
    return suffix in _PARTS and f"{linear}.weight" in matrices


def read_gptq(
    directory: Path, name: str, shape: tuple[int, int], variant: str, readers: Mapping[str, Reader]
) -> Quantized:
    """One matrix."""
    linear = name.removesuffix(".weight")
    words, zeros, scales = (readers[part](part) for part in (f"{linear}.{suffix}" for suffix in _PARTS[:3]))
    n_out, n_in = shape
    n_groups = len(scales)
    if f"{linear}.g_idx" in readers:
        order = readers[f"{linear}.g_idx"](f"{linear}.g_idx")
        if not torch.equal(order.long(), torch.arange(n_in) // (n_in // n_groups)):
            raise CheckpointError(
                f"{directory}: {linear}.g_idx puts inputs into groups out of order (act-order); groups are read in the "
                "order of the inputs only: take a version with desc_act false, or the model's bf16 version"
            )
    method = "awq" if variant == "awq" else "gptq"
    if method == "gptq":
        codes = _unpacked(words, method).transpose(1, 2).reshape(n_in, n_out)  # [I/8, O, 8] -> [I/8, 8, O]
    else:
        codes = _unpacked(words, method).reshape(n_in, n_out)
    zero = _unpacked(zeros, method).reshape(n_groups, n_out).float() + (1 if variant == "gptq" else 0)
    scales = scales.float()
    if bool((zero == 8).all()):
        return from_indices("int4", codes.T.contiguous(), scales.T.contiguous())
    return from_indices("int4-affine", codes.T.contiguous(), scales.T.contiguous(), (-zero * scales).T.contiguous())


def _unpacked(words: Tensor, method: str) -> Tensor:
    """The eight numbers of each word, in order: [..., 8]."""
    return torch.stack([words >> shift & 15 for shift in _SHIFTS[method]], dim=-1)
