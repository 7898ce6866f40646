"""Settings of a sweep. No torch here: the command line reads this module to print its help."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from arriero.errors import ConfigError
from arriero.io.paths import PathText
from arriero.settings import settle
from arriero.train.scaling.laws import NEAR


@dataclass(frozen=True)
class SweepConfig:
    """An isoFLOP sweep: for each budget of compute, models of several sizes trained until it is spent."""

    data: PathText = ""
    """Directory that `arriero shard` wrote, with held-out documents: their loss is what the laws are about."""
    out: PathText = "out/sweep"
    """Directory for the runs and runs.jsonl, which `arriero scaling fit` reads."""
    budgets: tuple[float, ...] = (1e12, 3e12, 1e13)
    """FLOPs of a run, C = 6 x parameters x tokens; at least two. More can be added to a sweep later."""
    sizes: int = 6
    """Models for each budget."""
    spread: float = 4.0
    """The largest model is so many times the middle size, the smallest as many times less."""
    tokens_per_param: float = 20.0
    """Tokens a parameter that the middle size of each budget gets; small models on few tokens are best with more."""
    seeds: int = 1
    """Runs of each model and budget, with seeds 0, 1, ...; more make the intervals honest about chance."""
    seq_len: int = 512
    """Tokens in a row."""
    validation_tokens: int = 100_000
    """Held-out tokens on which the loss is measured."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """As for `arriero pretrain`; a law holds for the recipe that it was measured with."""
    lr: float = 0.0
    """Peak learning rate of every run; 0 takes 0.3118 C^-0.125 (DeepSeek LLM, arXiv 2401.02954), 0.006 at most."""
    batch_rows: int = 0
    """Rows in the global batch of every run; 0 takes 0.292 C^0.3271 tokens (DeepSeek LLM, too)."""
    micro_tokens: int = 8192
    """Tokens that go through the model at once, at most."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and matmuls."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each model's blocks, as for `arriero pretrain`."""

    def __post_init__(self) -> None:
        settle(self)
        checks = {
            "budgets": (all(c > 0 for c in self.budgets), "each must be above 0"),
            "sizes": (4 <= self.sizes <= 24, "it must be in 4 (three models always lie on a parabola) to 24"),
            "spread": (self.spread > 1, "it must be above 1"),
            "tokens_per_param": (self.tokens_per_param > 0, "it must be above 0"),
            "seeds": (self.seeds >= 1, "it must be at least 1"),
            "seq_len": (self.seq_len >= 8, "it must be at least 8"),
            "validation_tokens": (self.validation_tokens >= self.seq_len, f"it must hold a row of {self.seq_len}"),
            "lr": (self.lr >= 0, "it must be at least 0 (0: by the budget)"),
            "batch_rows": (self.batch_rows >= 0, "it must be at least 0 (0: by the budget)"),
            "micro_tokens": (self.micro_tokens >= self.seq_len, f"it must hold a row of {self.seq_len}"),
        }
        for name, (ok, rule) in checks.items():
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)}; {rule}")
        if len(set(self.budgets)) < 2:
            raise ConfigError(f"budgets is {self.budgets}; a power law needs at least two: --budgets 1e12 3e12 1e13")
        for low, high in pairwise(sorted(set(self.budgets))):
            if high <= (1 + NEAR) * low:
                raise ConfigError(
                    f"budgets has {low:g} and {high:g}, which `arriero scaling fit` takes for one (they lie within "
                    f"{NEAR:.0%}); give budgets further apart, such as 1e12 3e12 1e13"
                )
