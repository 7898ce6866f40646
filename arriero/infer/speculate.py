"""Speculation: tokens are proposed, the model runs over all in one step, and those that it would have said stay.

A token's random number is a function of seed and index (sample.py), so verification draws each position with the number
that it has anyway, and a proposal stays while it is what was drawn. So the text is, token by token, the one that would
have come without speculation, greedy or sampled, penalties and grammars included; only rounding of logits in another
batch could change it, and a step whose bits depend on no batch has none. A proposal that is not taken has cost its row
of a step and nothing else.

Proposals come from the text itself (n-gram look-up): what followed where the last tokens stood before. Where they are
not taken often enough to pay for the rows, none are made for a while.
Price of a look-up: about 1 us a token.

Shapes: n proposed tokens of a request, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from arriero.infer.sample import Chosen, sample
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.step import Share
from arriero.infer.structured import Constraint


class _Rests:
    """Proposes nothing for a while where too little of what was proposed was right."""

    cost: float
    rest: int
    rate: float
    resting: int

    def learn(self, proposed: int, accepted: int) -> None:
        """Of `proposed` tokens, `accepted` were."""
        for i in range(proposed):
            self.rate += ((i < accepted) - self.rate) / 32
        if proposed and self.rate < self.cost:
            self.rate, self.resting = min(1.0, 2 * self.cost), self.rest


@dataclass
class Drafted(_Rests):
    """Of one request: whether a draft model's proposals are worth their steps; fields as in `Lookup`."""

    most: int
    cost: float = 0.4
    rest: int = 64
    rate: float = field(default=1.0, init=False)
    resting: int = field(default=0, init=False)

    def push(self, token: int) -> None:
        """A token was said."""
        self.resting = max(0, self.resting - 1)

    def propose(self) -> list[int]:
        """Places for the tokens that the draft is to say."""
        return [] if self.resting else [0] * self.most


@dataclass
class Lookup(_Rests):
    """Proposals for one request, from its own tokens.

    most: tokens proposed at once. longest, shortest: length of the n-gram that has to stand earlier in the text, the
    longest first. cost: of a further token in a step, as a share of the step; where fewer proposals than that are
    accepted, looking up rests for `rest` tokens.
    """

    ids: list[int]
    most: int = 8
    longest: int = 4
    shortest: int = 2
    cost: float = 0.1
    rest: int = 64
    rate: float = field(default=1.0, init=False)
    """Share of the proposed tokens that were accepted, over about the last 32."""
    resting: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.ids = list(self.ids)
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram to the position behind its last but current end
        for end in range(1, len(self.ids)):
            self._note(end)

    def push(self, token: int) -> None:
        """A token was said."""
        self._note(len(self.ids))
        self.ids.append(token)
        self.resting = max(0, self.resting - 1)

    def propose(self) -> list[int]:
        """Up to `most` tokens that may follow; often none."""
        if self.resting:
            return []
        for n in range(min(self.longest, len(self.ids)), self.shortest - 1, -1):
            if (at := self._followed.get(tuple(self.ids[-n:]))) is not None:
                said: list[int] = []
                for source in range(at, at + self.most):  # past its end, the text goes on with what is proposed
                    past = source - len(self.ids)
                    said.append(self.ids[source] if past < 0 else said[past])
                return said
        return []

    def _note(self, end: int) -> None:
        """Remember the n-grams before position `end`, and that they were followed by what stands there."""
        for n in range(self.shortest, min(self.longest, end) + 1):
            self._followed[tuple(self.ids[end - n : end])] = end


def positions(
    rows: Sequence[SamplerRow],
    proposals: Sequence[Sequence[int]],
    constraints: Sequence[Constraint | None] | None = None,
) -> tuple[list[SamplerRow], list[int]]:
    """The rows to sample at the last token of each request and at each of its proposed ones, and how many of each.

    Proposals that a request's grammar does not allow are cut off, so there may be fewer than n + 1.
    """
    out, counts = [], []
    for i, (row, proposed) in enumerate(zip(rows, proposals, strict=True)):
        constraint = constraints[i] if constraints else None
        masks = constraint.ahead(proposed) if constraint else [row.allowed] * (len(proposed) + 1)
        ahead = row.ahead(list(proposed)[: len(masks) - 1])
        for each, mask in zip(ahead, masks, strict=True):
            each.allowed = mask
        out += ahead
        counts.append(len(ahead))
    return out, counts


def verify(
    logits: Tensor,
    rows: Sequence[SamplerRow],
    proposals: Sequence[Sequence[int]],
    constraints: Sequence[Constraint | None] | None = None,
    share: Share | None = None,
) -> list[Chosen]:
    """What each request says next: the proposed tokens that it would have said, and one more.

    logits: of each request in turn, [n + 1, V]: behind its last token, and behind each proposed one. Rows and
    constraints are as they were before: push and accept the ids. Raises what `sample` and `Constraint.mask` raise.
    """
    asked, counts = positions(rows, proposals, constraints)
    starts = np.cumsum([0, *(len(proposed) + 1 for proposed in proposals)])
    assert starts[-1] == len(logits)
    kept = [int(start) + j for start, n in zip(starts, counts, strict=False) for j in range(n)]
    if len(kept) < len(logits):
        logits = logits[kept]
    chosen, begin, out = sample(logits, asked, share), 0, []
    for n, proposed in zip(counts, proposals, strict=True):
        same = 0
        while same < n - 1 and chosen.ids[begin + same] == proposed[same]:
            same += 1
        part = slice(begin, begin + same + 1)
        out.append(Chosen(chosen.ids[part], chosen.raw[part], chosen.sampled[part], chosen.top[part]))
        begin += n
    return out
