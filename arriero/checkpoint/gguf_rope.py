"""RoPE scaling in GGUF files, read and written as llama.cpp computes it.

Frequencies are divided by `rope.scaling.factor` (in old files `rope.scale_linear`), for YaRN by a factor that depends
on the index, and by the tensor `rope_freqs`, which holds Llama 3.1's scaling. For YaRN, sines and cosines are
multiplied by 0.1 ln(factor) + 1 and by `rope.scaling.attn_factor` (llama.cpp's ggml_rope_yarn); transformers has the
product of both as one number.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.errors import CheckpointError
from arriero.io.fields import Fields, shown
from arriero.model.config import LlamaConfig
from arriero.model.rope import rope_frequencies
from arriero.model.scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    yarn_attention,
)
from arriero.show.terminal import warn_once

ROPE_FREQS = "rope_freqs.weight"

# Entries below rope.scaling that llama.cpp reads for other architectures, or not at all, by what they must be here.
_NEUTRAL = {"yarn_log_multiplier": 0, "yarn_ext_factor": 1, "yarn_attn_factor": 1, "yarn_beta_fast": 32,
            "yarn_beta_slow": 1, "alpha": 0}  # fmt: skip


def read_scaling(fields: Fields, config: LlamaConfig, factors: Tensor | None) -> RopeScaling | None:
    """The scaling that llama.cpp would compute; raises CheckpointError for one that is not computed here.

    fields: the architecture's entries of the metadata. config: the shape. factors: the `rope_freqs` tensor, if any.
    """
    kind = fields.get("rope.scaling.type", "linear")  # old converters write the factor only
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{fields.file}: RoPE scaling {shown(kind)}; computed here are 'linear', 'yarn' and Llama 3.1's: take "
            "another model, or run this one with llama.cpp"
        )
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0)) if kind != "none" else 1.0
    factor = shortest(factor) or 1.0  # 0 means none in llama.cpp
    attention = shortest(fields.number("rope.scaling.attn_factor", 1.0))
    by_table = factors is not None and bool((factors != 1).any())
    _check_computed(fields, kind, factor, attention, by_table)
    if factors is not None and by_table:
        return _from_factors(fields, config, factors)
    if factor == 1 and attention == 1:
        return None
    if kind == "linear":
        return LinearScaling(factor)
    original = fields.whole("rope.scaling.original_context_length", config.max_context)
    return YarnScaling(factor, original, attention * yarn_attention(factor))


def _check_computed(fields: Fields, kind: str, factor: float, attention: float, by_table: bool) -> None:
    """Refuse a combination of settings that is not computed here. by_table: a `rope_freqs` tensor scales too."""
    odd = [key for key, neutral in _NEUTRAL.items() if fields.number(f"rope.scaling.{key}", neutral) != neutral]
    if odd or (attention != 1 and kind != "yarn") or (by_table and (factor != 1 or kind == "yarn")):
        values = [f"rope.scaling.{key} {fields[f'rope.scaling.{key}']}" for key in odd]
        raise CheckpointError(
            f"{fields.file}: RoPE is scaled by "
            + ", ".join([kind, f"factor {factor:g}", f"attn_factor {attention:g}", *values])
            + (f" and by {ROPE_FREQS}" if by_table else "")
            + ", which is not computed here: take another model, or run this one with llama.cpp"
        )


def scaling_entries(source: Path, config: LlamaConfig, by_factors: bool) -> dict[str, Any]:
    """The metadata from which llama.cpp scales RoPE as the model does; raises CheckpointError where it cannot.

    by_factors: whether it reads a `rope_freqs` tensor, with Llama 3.1's factors, for this architecture.
    """
    prefix = f"{config.model_type}.rope.scaling"
    match config.rope_scaling:
        case LinearScaling() as s:
            return {f"{prefix}.type": "linear", f"{prefix}.factor": float(s.factor)}
        case YarnScaling() as s:
            if (s.beta_fast, s.beta_slow, s.truncate) != (32.0, 1.0, True):
                raise CheckpointError(
                    f"{source}: YaRN with beta_fast {s.beta_fast:g}, beta_slow {s.beta_slow:g}, truncate "
                    f"{str(s.truncate).lower()}; llama.cpp computes it with 32, 1 and true only: convert to hf"
                )
            entries = {
                f"{prefix}.type": "yarn",
                f"{prefix}.factor": float(s.factor),
                f"{prefix}.original_context_length": s.original_context,
            }
            weighed = s.attention_factor / yarn_attention(s.factor)  # llama.cpp multiplies the two
            return entries if weighed == 1 else entries | {f"{prefix}.attn_factor": weighed}
        case Llama3Scaling() as s:
            if not by_factors:
                raise CheckpointError(f"{source}: llama.cpp scales RoPE in Llama's way for Llama only: convert to hf")
            return {f"{prefix}.original_context_length": s.original_context}
        case DynamicScaling():
            warn_once(
                f"{source}: its RoPE scaling is 'dynamic', which llama.cpp has not; the GGUF file says none, which is "
                f"the same up to the model's context of {config.max_context:,} tokens"
            )
    return {}


def rope_factors(config: LlamaConfig) -> Tensor:
    """What llama.cpp divides each frequency by, fp32 [h/2]: unscaled over scaled frequencies."""
    return rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)


def _from_factors(fields: Fields, config: LlamaConfig, factors: Tensor) -> Llama3Scaling:
    """The scaling whose factors a `rope_freqs` tensor holds, checked against every one of them."""
    original = fields.whole("rope.scaling.original_context_length", 8192)
    scaling = Llama3Scaling(factor=float(factors.max()), original_context=original)
    expected = rope_factors(replace(config, rope_scaling=scaling))
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{fields.file}: its rope_freqs are not those of Llama 3.1's scaling (low 1, high 4, original context "
            f"{original}, factor {scaling.factor:g})"
        )
    return scaling


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 is meant to be 1e-05."""
    return float(str(np.float32(value)))
