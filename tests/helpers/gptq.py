"""Toy models as GPTQ's and AWQ's tools would write them, packed number by number as the formats define it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from arriero.checkpoint.hf import save_hf
from arriero.model.config import LlamaConfig
from helpers.toys import toy_model

SHAPE = LlamaConfig(64, 2, 4, 2, 96, 211, 64)
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code lies at each four bits of a word, from the low ones on


def words(codes: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers along an axis in each 32 bits, one by one as the formats describe it."""
    codes = np.moveaxis(codes, axis, -1)
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for place, which in enumerate(order):
        out |= codes[..., which::8].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(out, -1, axis)).view(np.int32))


def quantized(method: str, root: Path, *, symmetric: bool = False, version: str = "") -> dict[str, np.ndarray]:
    """Write a toy model as a tool of this method would; returns what its matrices are, by name."""
    save_hf(toy_model(SHAPE), root)
    file, rng, expected = root / "model.safetensors", np.random.default_rng(3), {}
    state = load_file(file)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        n_out, n_in = state.pop(name).shape
        codes = rng.integers(0, 16, (n_in, n_out))
        zeros = np.full((n_in // GROUP, n_out), 8) if symmetric else rng.integers(1, 16, (n_in // GROUP, n_out))
        scales = rng.uniform(0.001, 0.02, zeros.shape).astype(np.float16)
        spread = [np.repeat(x.astype(np.float32), GROUP, axis=0) for x in (scales, zeros)]
        expected[name] = (spread[0] * (codes - spread[1])).T
        linear = name.removesuffix(".weight")
        order = AWQ_ORDER if method == "awq" else tuple(range(8))
        minus = 1 if method == "gptq" and version != "gptq_v2" else 0
        state[f"{linear}.qweight"] = words(codes, 1 if method == "awq" else 0, order)
        state[f"{linear}.qzeros"] = words(zeros - minus, 1, order)
        state[f"{linear}.scales"] = torch.from_numpy(scales)
        if method == "gptq":
            state[f"{linear}.g_idx"] = torch.arange(n_in, dtype=torch.int32) // GROUP
    save_file(state, file, {"format": "pt"})
    stated = {"quant_method": method, "bits": 4, "group_size": GROUP}
    if version:
        stated["checkpoint_format" if method == "gptq" else "version"] = version
    set_config(root, stated)
    return expected


def set_config(root: Path, stated: dict) -> None:
    config = json.loads((root / "config.json").read_text())
    config.setdefault("quantization_config", {}).update(stated)
    (root / "config.json").write_text(json.dumps(config))
