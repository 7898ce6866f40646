"""The shape of a Llama or a related architecture, read from config.json and written to it.

`LlamaConfig.n_params` is computed from the shape, not stored. The published sizes are in catalogue.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from arriero.errors import CheckpointError, ConfigError
from arriero.io.fields import LARGEST, Fields
from arriero.model.entries import check_entries
from arriero.model.scaling import DynamicScaling, RopeScaling, read_scaling


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama decoder; enough to build it and to write its `config.json`.

    dim: model width. ffn_dim: width of the SwiGLU. max_context: positions the model was made for.
    head_dim is `dim // n_heads` unless given. n_kv_heads = n_heads is MHA, 1 is MQA, between is GQA.
    Raises `ConfigError` on construction when the numbers do not fit each other.
    """

    model_type: ClassVar[str] = "llama"  # the architecture's name in config.json and in GGUF files
    # where config.json says none, as in transformers; 0: dim // n_heads
    default_context: ClassVar[int] = 2048
    default_head_dim: ClassVar[int] = 0

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    max_context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    head_dim: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "max_context"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ConfigError(f"model: {name} is {getattr(self, name)}; it must be at least 1, at most {LARGEST:,}")
        if not 0 < self.norm_eps < 1:
            raise ConfigError(f"model: norm_eps is {self.norm_eps}; it must be above 0 and below 1 (usual: 1e-5)")
        if not 1 < self.rope_theta < math.inf:
            raise ConfigError(f"model: rope_theta is {self.rope_theta}; it must be above 1 (usual: 10,000 or more)")
        if self.head_dim == 0:
            if self.dim % self.n_heads:
                raise ConfigError(
                    f"model: dim {self.dim} is not divisible by n_heads {self.n_heads}; change one, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim % 2:
            raise ConfigError(f"model: head_dim {self.head_dim} is odd; RoPE rotates pairs, so it must be even")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}; "
                "each KV head serves the same number of query heads"
            )

    @property
    def n_params(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        return self.n_layers * block + self.dim + embeddings

    def flops_per_token(self, context: float) -> float:
        """FLOPs of forward and backward of one token that sees `context` tokens on average (itself included).

        6 for each parameter of a matrix product, the head included and the embedding look-up not, and 12 H h context
        a layer for scores and values: the model's own work, whatever is recomputed (PaLM, arXiv 2204.02311, app. B).
        """
        head = self.vocab_size * self.dim
        products = self.n_params - head * (0 if self.tied_embeddings else 1)
        return 6 * products + 12 * self.n_layers * self.n_heads * self.head_dim * context

    def check_length(self, n_tokens: int) -> None:
        """Refuse a text of so many tokens where its positions cannot be computed (see `DynamicScaling`)."""
        if isinstance(self.rope_scaling, DynamicScaling) and n_tokens > self.max_context:
            raise ConfigError(
                f"a text of {n_tokens:,} tokens, and the model's RoPE scaling is 'dynamic' beyond {self.max_context:,} "
                "(max_position_embeddings): there every further token would turn all earlier keys anew, so it is not "
                "computed; shorten the text, or set rope_scaling in config.json to 'yarn' or 'linear'"
            )

    @staticmethod
    def from_hf(config: Mapping[str, Any], file: str = "config.json") -> LlamaConfig:
        """Read a Hugging Face `config.json`; its `model_type` decides the class.

        file: its name for messages. Raises `CheckpointError` for what these decoders do not compute (other
        architectures, biases, windows, other activations, other RoPE) and for values of a wrong type or range.
        """
        kind = config.get("model_type")
        if kind not in tuple(ARCHITECTURES):
            raise CheckpointError(
                f"{file}: model_type is {kind!r}; Arriero's decoders compute {', '.join(ARCHITECTURES)} only. "
                "Other architectures get their own file in arriero/model/"
            )
        fields, shape = Fields(config, file), ARCHITECTURES[kind]
        check_entries(fields, kind)
        n_heads, context = (
            fields.whole("num_attention_heads"),
            fields.whole("max_position_embeddings", shape.default_context),
        )
        with fields.blamed():
            theta, scaling = read_scaling(fields, context)
            return shape(
                dim=fields.whole("hidden_size"),
                n_layers=fields.whole("num_hidden_layers"),
                n_heads=n_heads,
                n_kv_heads=fields.whole("num_key_value_heads", n_heads),
                ffn_dim=fields.whole("intermediate_size"),
                vocab_size=fields.whole("vocab_size"),
                max_context=context,
                norm_eps=fields.number("rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                tied_embeddings=fields.flag("tie_word_embeddings", False),
                head_dim=fields.whole("head_dim") if "head_dim" in fields else shape.default_head_dim,
            )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the `config.json` that transformers, vLLM and llama.cpp's converter read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": self.model_type,
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_hf(),
            "tie_word_embeddings": self.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": dtype,
        }


@dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    """The shape of a dense Qwen3 (arXiv 2505.09388, section 2): a Llama whose queries and keys are normalised by head.

    Its head_dim is 128 at every size, whatever dim and n_heads are.
    """

    model_type: ClassVar[str] = "qwen3"
    default_context: ClassVar[int] = 32_768
    default_head_dim: ClassVar[int] = 128

    @property
    def n_params(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        return super().n_params + self.n_layers * 2 * self.head_dim

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the `config.json` that transformers, vLLM and llama.cpp's converter read."""
        own = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
        return super().to_hf(dtype) | own


ARCHITECTURES: dict[str, type[LlamaConfig]] = {shape.model_type: shape for shape in (LlamaConfig, Qwen3Config)}
