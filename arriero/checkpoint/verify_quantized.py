"""Matrices in few bits multiplied out by NumPy, from the tensors of a file as their formats describe them.

A part of verify.py, which shares nothing with this package's readers and writers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# QLoRA's levels (arXiv 2305.14314, appendix E), written once more: a wrong digit in quant/nf4.py is to be seen here
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code lies at each four bits of a word


@dataclass(frozen=True)
class Matrix:
    """A matrix: its shape, and how to multiply it out."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def is_part(name: str) -> bool:
    """Whether a tensor is one of several that a matrix in few bits is made of, and not the one with its own name."""
    return re.search(r"\.(weight_(packed|scale|shape|zero_point|g_idx)|qweight|qzeros|scales|g_idx)$", name) is not None


def quantized_matrices(
    shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor], stated: Mapping[str, Any]
) -> dict[str, Matrix]:
    """The matrices in few bits among the tensors of a directory, by the name that they would have as dense ones."""
    found = {}
    for name in shapes:
        linear, _, part = name.rpartition(".")
        if part == "weight_scale":
            found[f"{linear}.weight"] = _compressed(f"{linear}.weight", shapes, tensor)
        elif part == "qweight":
            found[f"{linear}.weight"] = _gptq(linear, shapes, tensor, stated)
    return found


def _compressed(name: str, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor]) -> Matrix:
    """compressed-tensors' layouts, and NF4's levels in bytes: code times scale."""
    if name in shapes:
        shape = shapes[name]
    elif f"{name}_shape" in shapes:
        shape = tuple(tensor(f"{name}_shape").tolist())
    else:
        rows, halves = shapes[f"{name}_packed"]
        shape = rows, 2 * halves

    def read() -> Tensor:
        scales = tensor(f"{name}_scale").float().numpy()
        scales = scales.reshape(len(scales), -1, 1)
        if name in shapes:
            codes = tensor(name).numpy().astype(np.float32)
        else:
            packed = tensor(f"{name}_packed").numpy()
            codes = packed.view(np.uint8)
            if codes.shape[1] >= shape[1]:
                codes = codes[:, : shape[1]].astype(np.float32) - 128
            else:
                halves = np.stack([codes % 16, codes // 16], axis=2).reshape(len(codes), -1)[:, : shape[1]]
                codes = np.array(NF4, np.float32)[halves] if packed.dtype == np.uint8 else halves.astype(np.float32) - 8
        codes = codes.reshape(len(codes), scales.shape[1], -1)
        if f"{name}_zero_point" in shapes:
            words = tensor(f"{name}_zero_point").numpy()
            zeros = np.stack([words >> 4 * i & 15 for i in range(8)], axis=1).reshape(-1, words.shape[1])[: len(codes)]
            codes = codes + (8 - zeros[:, :, None]).astype(np.float32)
        return torch.from_numpy((codes * scales).reshape(shape))

    return Matrix(shape, read)


def _gptq(
    linear: str, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor], stated: Mapping[str, Any]
) -> Matrix:
    """GPTQ's and AWQ's layouts: scale (code - zero), inputs by outputs."""
    n_groups, n_out = shapes[f"{linear}.scales"]
    awq = stated.get("quant_method") == "awq"
    n_in = shapes[f"{linear}.qweight"][0] * (1 if awq else 8)

    def numbers(part: str, rows: int, columns: int, by_rows: bool) -> np.ndarray:
        words = tensor(f"{linear}.{part}").numpy().view(np.uint32)
        out = np.empty((rows, columns), np.float32)
        for place in range(8):
            which = _AWQ[place] if awq else place
            got = words >> np.uint32(4 * place) & np.uint32(15)
            if by_rows:
                out[which::8] = got
            else:
                out[:, which::8] = got
        return out

    def read() -> Tensor:
        codes = numbers("qweight", n_in, n_out, not awq)
        zeros = numbers("qzeros", n_groups, n_out, False)
        if not awq and stated.get("checkpoint_format") != "gptq_v2":
            zeros += 1
        scales = tensor(f"{linear}.scales").float().numpy()
        each = n_in // n_groups
        values = (codes - np.repeat(zeros, each, axis=0)) * np.repeat(scales, each, axis=0)
        return torch.from_numpy(np.ascontiguousarray(values.T))

    return Matrix((n_out, n_in), read)
