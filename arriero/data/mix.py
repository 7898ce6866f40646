"""Which source row n comes from: a weighted mixture in a deterministic order that keeps the weights at every length.

After any n rows a source of weight w (of 1) has had n w of them to within one row, so the proportions hold over short
stretches as over long ones, without random draws. The order is Tijdeman's (The chairman assignment problem, Discrete
Mathematics 32, 1980): of the sources that are due, the one with the earliest deadline. It repeats after D rows, where D
is the common denominator of the weights. One period is computed in the constructor; then a row's source, the number of
a source's rows before it, and the index of a source's m-th row are table look-ups: pure functions of n, in integers
only, so every machine computes the same.

Price: one period in memory, at most 2^17 entries of 2 bytes and their positions; at most 0.2 seconds to compute.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ConfigError

MAX_PERIOD = 2**17  # rows; weights that need a longer period are rounded to shares of it

LLAMA1 = {
    "commoncrawl": (67.0, 1.10),
    "c4": (15.0, 1.06),
    "github": (4.5, 0.64),
    "wikipedia": (4.5, 2.45),
    "books": (4.5, 2.23),
    "arxiv": (2.5, 1.06),
    "stackexchange": (2.0, 1.03),
}
"""Llama 1's mixture: per cent of the tokens, and the epochs that came to (arXiv 2302.13971, table 1)."""


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Whole weights in the same proportion, as the weights' decimal digits state it: {"a": 0.3, "b": 0.1} -> 3, 1.

    Where their sum would exceed MAX_PERIOD they are rounded to shares of it (at least one), which moves no share by
    more than 1 / MAX_PERIOD. Raises ConfigError for a weight that is negative or not finite, and where all are 0.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight of {name!r} is {weight}; give a number of 0 or more")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
    if not exact:
        raise ConfigError(
            f"no source has a weight above 0 (sources: {', '.join(weights) or 'none'}); give one of them 1"
        )
    scale = math.lcm(*(w.denominator for w in exact.values()))
    whole = {name: int(w * scale) for name, w in exact.items()}
    divisor = math.gcd(*whole.values())
    whole = {name: w // divisor for name, w in whole.items()}
    total = sum(whole.values())
    if total <= MAX_PERIOD:
        return whole
    return {name: max(1, (2 * w * MAX_PERIOD + total) // (2 * total)) for name, w in whole.items()}


class MixtureOrder:
    """The endless order of sources by weight; those of weight 0 never come."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        whole = integer_weights(weights)
        self.names = tuple(whole)
        self.period = sum(whole.values())
        self.shares = {name: Fraction(w, self.period) for name, w in whole.items()}
        self._order = _chairmen(list(whole.values()))
        self._places = {name: np.flatnonzero(self._order == i) for i, name in enumerate(self.names)}

    def source(self, n: int) -> str:
        """The source of row n."""
        return self.names[self._order[n % self.period]]

    def count(self, name: str, n: int) -> int:
        """Rows of source `name` among the first n."""
        periods, rest = divmod(n, self.period)
        places = self._places[name]
        return periods * len(places) + int(np.searchsorted(places, rest))

    def position(self, name: str, m: int) -> int:
        """The row that is the m-th of source `name`, from 0: count(name, position(name, m)) == m."""
        places = self._places[name]
        periods, rest = divmod(m, len(places))
        return periods * self.period + int(places[rest])


def _chairmen(weights: list[int]) -> NDArray[np.int16]:
    """One period of Tijdeman's order, [D], for k sources of whole `weights` that sum to D.

    With s = 2 k - 2, source i having had x of the first n - 1 rows is due at row n (from 1) once
    w n / D - x >= 1 / s, and late after (x + 1 - 1 / s) D / w. Taking the earliest deadline among those due keeps
    every source within 1 - 1 / s rows of its share.
    """
    k, total = len(weights), sum(weights)
    if k == 1:
        return np.zeros(total, dtype=np.int16)
    s = 2 * k - 2
    order = np.empty(total, dtype=np.int16)

    def due(i: int, x: int) -> int:
        return -(-(total * (s * x + 1)) // (s * weights[i]))

    def deadline(i: int, x: int) -> int:
        return total * (s * x + s - 1) // (s * weights[i]) + 1

    waiting = [(due(i, 0), i, 0) for i in range(k)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for n in range(1, total + 1):
        while waiting and waiting[0][0] <= n:
            _, i, x = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(i, x), i, x))
        _, i, x = heapq.heappop(ready)
        order[n - 1] = i
        heapq.heappush(waiting, (due(i, x + 1), i, x + 1))
    return order
