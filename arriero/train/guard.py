"""Spikes: steps whose loss or gradient norm is far above its running mean. Their update is skipped, as PaLM (arXiv
2204.02311, section 5.1) and OLMo 2 (2501.00656) did by hand: one bad batch in a billion tokens should not cost a run.

Mean and variance are exponential, over about the last hundred steps. What a spike adds to them is capped at the
threshold, so a lasting change (another mixture, longer rows) is accepted after some tens of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MEMORY = 0.99  # weight of the past
WARM = 50  # steps before any step is called a spike


class SpikeGuard:
    """Tells spikes from other steps; `state` is all that has to be saved, as JSON holds it."""

    def __init__(self, deviations: float, state: Sequence[float] = ()) -> None:
        """deviations: standard deviations above the mean from which a value is a spike; 0 calls nothing one."""
        self.deviations = deviations
        self.steps: float = state[0] if state else 0
        self._mean, self._variance = (list(state[i : i + 2]) if state else [0.0, 0.0] for i in (1, 3))

    @property
    def state(self) -> list[float]:
        """Steps seen, means, variances (of loss and gradient norm)."""
        return [self.steps, *self._mean, *self._variance]

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether a finite step is a spike; it is added to mean and variance either way."""
        if not self.deviations:
            return False
        spike = False
        self.steps += 1
        weight = max(1 - MEMORY, 1 / self.steps)  # a plain mean at first
        for i, value in enumerate((loss, grad_norm)):
            limit = self._mean[i] + self.deviations * math.sqrt(self._variance[i])
            if self.steps > WARM and value > limit:
                spike, value = True, limit
            change = value - self._mean[i]
            self._mean[i] += weight * change
            self._variance[i] = (1 - weight) * (self._variance[i] + weight * change * change)
        return spike
