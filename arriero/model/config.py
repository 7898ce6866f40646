"""The shape of a Llama and of its relatives, and every size that was published.

Sizes and parameter counts follow the papers (Llama 1: arXiv 2302.13971, Llama 2: 2307.09288, Llama 3: 2407.21783,
Qwen3: 2505.09388) and the model cards. `LlamaConfig.n_params` is computed from the shape, not stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from arriero.errors import CheckpointError, ConfigError
from arriero.fields import LARGEST, Fields
from arriero.model.entries import check_entries
from arriero.model.scaling import DynamicScaling, Llama3Scaling, RopeScaling, read_scaling
from arriero.paths import lies_here


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
        """Refuse a text of so many tokens where its positions cannot be computed: `DynamicScaling` says why."""
        if isinstance(self.rope_scaling, DynamicScaling) and n_tokens > self.max_context:
            raise ConfigError(
                f"a text of {n_tokens:,} tokens, and the model's RoPE scaling is 'dynamic' beyond {self.max_context:,} "
                "(max_position_embeddings): there every further token would turn all earlier keys anew, so it is not "
                "computed; shorten the text, or set rope_scaling in config.json to 'yarn' or 'linear'"
            )

    @staticmethod
    def from_hf(config: Mapping[str, Any], file: str = "config.json") -> LlamaConfig:
        """Read a Hugging Face `config.json`; `model_type` there says which of the classes here comes back.

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


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): which linears carry one, and how strongly it acts."""

    rank: int = 16
    """Width r of the low-rank product B A."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha/rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped in training."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of linears within each block, or all-linear (never the head or the embeddings)."""
    rslora: bool = False
    """Scale by alpha/sqrt(rank) instead (arXiv 2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Exceptions to rank by full module name, such as "model.layers.3.mlp.up_proj"."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Exceptions to alpha by full module name."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora: rank is {self.rank}; it must be at least 1 (usual: 8 to 64)")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora: dropout is {self.dropout}; it must be in [0, 1)")
        if not self.targets:
            raise ConfigError("lora: targets is empty; name linears such as 'q_proj', or use 'all-linear'")

    def scale(self, rank: int, alpha: float) -> float:
        """The factor s in W x + s B A x."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def matches(self, name: str) -> bool:
        """Whether the linear of this full name is adapted; a target matches its whole name or its last parts."""
        if "all-linear" in self.targets:
            return name.rsplit(".", 1)[-1] in LINEARS
        return any(name == target or name.endswith("." + target) for target in self.targets)


def _llama1(dim: int, n_layers: int, n_heads: int, ffn_dim: int, eps: float = 1e-5) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_heads, ffn_dim, 32_000, 2048, norm_eps=eps)


def _llama3(
    dim: int, n_layers: int, n_heads: int, ffn_dim: int, factor: float | None, tied: bool = False
) -> LlamaConfig:
    scaling = None if factor is None else Llama3Scaling(factor)
    context = 8192 if factor is None else 131_072
    return LlamaConfig(
        dim, n_layers, n_heads, 8, ffn_dim, 128_256, context,
        rope_theta=500_000.0, rope_scaling=scaling, tied_embeddings=tied,
    )  # fmt: skip


def _smollm2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, theta: float) -> LlamaConfig:
    return LlamaConfig(
        dim, n_layers, n_heads, n_kv_heads, ffn_dim, 49_152, 8192, rope_theta=theta, tied_embeddings=True
    )


def _qwen3(dim: int, n_layers: int, n_heads: int, ffn_dim: int, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        dim, n_layers, n_heads, 8, ffn_dim, 151_936, 32_768,
        norm_eps=1e-6, rope_theta=1e6, tied_embeddings=tied, head_dim=128,
    )  # fmt: skip


def _small(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, vocab_size: int, context: int
) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_kv_heads, ffn_dim, vocab_size, context, tied_embeddings=True)


PUBLISHED: dict[str, LlamaConfig] = {
    "llama1-7b": _llama1(4096, 32, 32, 11_008, eps=1e-6),
    "llama1-13b": _llama1(5120, 40, 40, 13_824),
    "llama1-33b": _llama1(6656, 60, 52, 17_920),
    "llama1-65b": _llama1(8192, 80, 64, 22_016),
    "llama2-7b": LlamaConfig(4096, 32, 32, 32, 11_008, 32_000, 4096, norm_eps=1e-6),
    "llama2-13b": LlamaConfig(5120, 40, 40, 40, 13_824, 32_000, 4096),
    "llama2-70b": LlamaConfig(8192, 80, 64, 8, 28_672, 32_000, 4096),
    "llama3-8b": _llama3(4096, 32, 32, 14_336, None),
    "llama3-70b": _llama3(8192, 80, 64, 28_672, None),
    "llama3.1-8b": _llama3(4096, 32, 32, 14_336, 8.0),
    "llama3.1-70b": _llama3(8192, 80, 64, 28_672, 8.0),
    "llama3.1-405b": _llama3(16_384, 126, 128, 53_248, 8.0),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, tied=True),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536, 100_000.0),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, 130_000.0),
}

QWEN3: dict[str, LlamaConfig] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
}
"""The dense models of Qwen3; the context is what they were trained at (section 3.2)."""

LADDER: dict[str, LlamaConfig] = {
    "1m": _small(128, 4, 4, 2, 384, 2048, 1024),
    "10m": _small(320, 6, 5, 5, 896, 8192, 1024),
    "30m": _small(512, 8, 8, 4, 1536, 8192, 1024),
    "qwen3-30m": Qwen3Config(512, 8, 8, 4, 1536, 8192, 1024, norm_eps=1e-6, tied_embeddings=True),
    "124m": _small(768, 12, 12, 4, 2816, 32_768, 2048),
    "350m": _small(1024, 28, 16, 4, 2816, 32_768, 2048),
    "1b": _small(2048, 16, 32, 8, 8192, 32_768, 4096),
}
"""Our own small shapes to pretrain from nothing, named by their size.

In a run the vocabulary is the tokenizer's, and the context that of the longest row."""

SHAPES = {**LADDER, **PUBLISHED, **QWEN3}


def named_shape(name: str) -> LlamaConfig | None:
    """The known shape of that name; None where there is none, or where the name is a path here, which says so once."""
    return None if name not in SHAPES or lies_here(name, "the shape") else SHAPES[name]
