"""What a run measures on rows that it does not learn from: the objective's losses, and bits per byte where bytes are
known, in all and by source.

Bits are over the bytes of the tokens that are measured (data/held_out.py); there are none of a source whose tokens have
no bytes. Price: a token that is measured takes a third of the time of one that is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arriero.data.batch import Batch
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Objective, Totals
from arriero.train.objectives import next_token


@dataclass(frozen=True)
class HeldOut:
    """Batches 0 to n - 1 of one source. n_bytes: of the text that their targets stand for; None where nobody knows."""

    batch: Callable[[int], Batch]
    n: int
    n_bytes: float | None = None


@dataclass(frozen=True)
class Validation:
    """Measures all of `held_out`, by source. samples: texts that show what the model says now; None for none."""

    engine: Engine
    held_out: Mapping[str, HeldOut]
    objective: Objective = field(default_factory=next_token)
    samples: Callable[[], list[str]] | None = None

    def __call__(self) -> dict[str, Any]:
        """The objective's loss and metrics over all sources, bits per byte, and samples."""
        found = {name: self._measure(source) for name, source in self.held_out.items()}
        whole = _added(found.values())
        measured: dict[str, Any] = {"loss": whole.loss, **whole.metrics}
        known = {name: source.n_bytes for name, source in self.held_out.items() if source.n_bytes is not None}
        if known:
            measured["bits_per_byte"] = _bits_per_byte(
                sum(found[name].sums["loss"] for name in known), sum(known.values())
            )
        if len(known) > 1:
            for name, n_bytes in known.items():
                measured[f"bits_per_byte_{name}"] = _bits_per_byte(found[name].sums["loss"], n_bytes)
        return measured if self.samples is None else {**measured, "samples": self.samples()}

    def _measure(self, source: HeldOut) -> Totals:
        return self.engine.measure(lambda i: source.batch(i).to(self.engine.mesh.device), source.n, self.objective)


def _added(each: Iterable[Totals]) -> Totals:
    """Sums and counts of several, which are of one objective, together."""
    first, *rest = each
    sums, counts = dict(first.sums), dict(first.counts)
    for totals in rest:
        for name in sums:
            sums[name] += totals.sums[name]
            counts[name] += totals.counts[name]
    return Totals(sums, counts, first.weights)


def _bits_per_byte(nats: float, n_bytes: float) -> float | None:
    return nats / math.log(2) / n_bytes if n_bytes else None


def validation_interval(steps: int, tokens: int, measured: int) -> int:
    """Steps between validations of `measured` tokens: ten in a run of `tokens`, or fewer that take a tenth of its time.

    A token that is measured takes a third of the time of one that is trained on.
    """
    return math.ceil(steps / min(10, max(1, 3 * tokens // (10 * max(1, measured)))))
