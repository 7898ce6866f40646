"""Settings of a low-rank adapter: rank, alpha, and the linears that carry one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from arriero.errors import ConfigError

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
