"""A LoRA adapter as llama.cpp reads it: a GGUF file with the two factors of each linear.

llama.cpp adds (alpha / r) B A x, r being the rows of A; so where an adapter's scale s is another (rsLoRA, exceptions to
alpha), B is multiplied by s r / alpha. Rows of B for q and k are turned in adjacent pairs, as those of the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from arriero.checkpoint.gguf import paired_heads, tensor_names
from arriero.checkpoint.weights import to_pairs
from arriero.io.files import replaced_file
from arriero.model.config import LlamaConfig
from arriero.model.lora_config import LoraConfig


def write_lora(file: Path, config: LlamaConfig, lora: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter (as `read_adapter` gives it) for a model of this shape, in fp32."""
    names = tensor_names(config)
    with replaced_file(file) as temporary:
        writer = gguf.GGUFWriter(str(temporary), config.model_type)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.alpha)
        for full in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
            a, b = (tensors[f"{full}.lora_{factor}.weight"].float() for factor in "AB")
            rank = len(a)
            b = b * (lora.scale(rank, lora.alpha_pattern.get(full, lora.alpha)) * rank / lora.alpha)
            hf = f"{full}.weight"
            if heads := paired_heads(hf, config):
                b = to_pairs(b, heads)
            for factor, matrix in (("a", a), ("b", b)):
                writer.add_tensor(f"{names[hf]}.lora_{factor}", np.ascontiguousarray(matrix.numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
