"""From a shape to a model: the one place that knows which class computes which architecture."""

from __future__ import annotations

from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.llama import Llama
from arriero.model.qwen3 import Qwen3

_MODELS: dict[type[LlamaConfig], type[Llama]] = {LlamaConfig: Llama, Qwen3Config: Qwen3}


def build_model(config: LlamaConfig) -> Llama:
    """A model of this shape, with torch's own first weights: load some, or call `init_weights`."""
    return _MODELS[type(config)](config)
