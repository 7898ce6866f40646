"""What a step computes: sums over a batch, and the counts over the global batch that each of them is divided by.

A loss may have several terms with different denominators (DPO: pairs, plus a share of cross-entropy: tokens). An
objective never divides: it gives each term summed over the batch it is handed, and says beforehand how many tokens,
documents, pairs or groups of that batch the term is over. The engine knows the counts of the whole global batch and
divides by those, so any split into micro-batches and processes gives one loss and one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from arriero.data.batch import Batch
from arriero.model.llama import Llama


@dataclass(frozen=True)
class Objective:
    """loss = sum over terms t of weights[t] * (t summed over the global batch) / (count of t in the global batch).

    sums: from a batch, scalars by name: the terms, and other quantities to record (which need no gradient).
    counts: from a batch, by the same names, what each is divided by. weights: of the terms, by name.
    """

    sums: Callable[[Llama, Batch], Mapping[str, Tensor]]
    counts: Callable[[Batch], Mapping[str, float]]
    weights: Mapping[str, float] = field(default_factory=lambda: {"loss": 1.0})


@dataclass(frozen=True)
class Totals:
    """Sums and counts over a whole global batch, by name."""

    sums: Mapping[str, float]
    counts: Mapping[str, float]
    weights: Mapping[str, float]

    def mean(self, name: str) -> float:
        """The sum divided by its count; nan where nothing was counted."""
        return self.sums[name] / self.counts[name] if self.counts[name] else float("nan")

    @property
    def loss(self) -> float:
        """The whole loss; a term whose count is 0 adds nothing."""
        return sum(weight * self.mean(name) for name, weight in self.weights.items() if self.counts[name])

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of every sum, except where it is the whole loss."""
        whole = next(iter(self.weights)) if len(self.weights) == 1 else None
        return {name: self.mean(name) for name in self.sums if name != whole}
