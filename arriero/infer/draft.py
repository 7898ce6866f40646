"""Proposals by a smaller model of the same tokenizer, the draft, whose keys and values lie in blocks of equal numbers.

The draft computes every token that the model does, so that whatever is shared, copied or evicted holds for both. It
says each proposal with the random number that its position has anyway (sample.py), so where the two models agree they
draw the same token, at any temperature.

Price: a step of the draft for each step of the model and for each proposed token; adapters act on the model alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from arriero.infer.sample import sample
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.scheduler import Plan, Sequence
from arriero.infer.step import Step, StepInput


class Draft:
    """A step that follows another's plans."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def fill(self, plan: Plan, row_of: Callable[[Sequence], SamplerRow]) -> None:
        """Compute the plan's tokens, and write what the draft would say in the places of those proposed."""
        batch, adapters = plan.batch, [None] * len(plan.parts)
        lengths = np.array([part.n for part in plan.parts])
        firsts = np.cumsum(lengths) - lengths
        drafted = [i for i, part in enumerate(plan.parts) if part.sequence.proposed]
        known = np.ones(len(batch.tokens), dtype=bool)
        for i in drafted:
            known[firsts[i] + 1 : firsts[i] + lengths[i]] = False
        at = np.cumsum(known) - 1
        outputs = np.array([at[firsts[i]] for i in drafted] or [0], dtype=np.int32)
        logits = self.step(
            StepInput(
                batch.tokens[known], batch.positions[known], batch.sequences[known], batch.tables, outputs, adapters
            )
        )
        n = 0
        while drafted:
            sequences = [plan.parts[i].sequence for i in drafted]
            rows = [_ahead(row_of(sequence), sequence.proposed[:n]) for sequence in sequences]
            for i, sequence, token in zip(drafted, sequences, sample(logits, rows).ids.tolist(), strict=True):
                sequence.proposed[n] = batch.tokens[firsts[i] + 1 + n] = token
            here = firsts[drafted] + 1 + n
            going = [len(sequence.proposed) > n + 1 for sequence in sequences]
            outputs = np.flatnonzero(going or [True]).astype(np.int32)
            logits = self.step(
                StepInput(
                    batch.tokens[here], batch.positions[here], batch.sequences[here], batch.tables,
                    outputs if len(outputs) else np.zeros(1, np.int32), adapters,
                )
            )  # fmt: skip
            drafted = [i for i, goes in zip(drafted, going, strict=True) if goes]
            n += 1


def _ahead(row: SamplerRow, proposed: list[int]) -> SamplerRow:
    """The row behind these tokens, free of any grammar, which decides when they are verified."""
    last = row.ahead(proposed)[-1]
    last.allowed, last.n_top, last.native.n_top = None, 0, 0
    return last
