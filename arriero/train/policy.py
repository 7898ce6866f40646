"""From scored answers to gradients: rows that share their prompt, the objective of a policy, and what is watched.

A row is one group: the prompt but for its last token is a document that all answers continue, so it is computed once.
An answer's document is the prompt's last token and the answer but for its last one: each position predicts the token
that was sampled there; an episode's replies are in it too, and are not predicted. What is known of each of those tokens
goes along as extras of the row:

    sampled     log-probability with which the sampler drew it
    mask        1 where the policy chose it, 0 where an environment wrote it
    weights     its weight in the sum of losses (`losses.policy.token_weights`)
    advantages  how much better than expected it was
    old         log-probability before the first update, where there are several (else: the current one)
    reference   log-probability of the reference, where there is a KL term

and `counted`, of each answer, is what it adds to the denominator. Answers that do not count, and groups that teach
nothing, are in no row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from arriero.data.batch import IGNORED, Batch, Row, collate
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Objective
from arriero.losses.lm import token_logprobs
from arriero.losses.policy import (
    cispo,
    clipped,
    dppo,
    kl_estimate,
    mismatch_weights,
    reinforce,
    sequence_clipped,
    token_weights,
)
from arriero.model.llama import Llama
from arriero.train.episodes import Sampled
from arriero.train.rl_config import PolicyConfig

PADDED_TO = 64  # tokens: batches are as long as a multiple of this, so that few shapes occur


# -- rows --------------------------------------------------------------------------------------------------------------


def group_row(
    prompt: Sequence[int],
    answers: Sequence[Sampled],
    advantages: Sequence[Any],
    normalise: Any = "tokens",
    longest: int = 1,
    **extras: Sequence[Sequence[float]],
) -> Row:
    """One prompt and its answers, as in the module's docstring.

    advantages: of each answer, a number, or one for each of its tokens. normalise, longest: `token_weights`'s. extras:
    further values of the answers' tokens, by name.
    """
    lead, last = list(prompt[:-1]), prompt[-1]
    lengths, leads = ([len(lead)], [-1]) if lead else ([], [])
    tokens, targets = list(lead), [IGNORED] * len(lead)
    values: dict[str, list[float]] = {name: [0.0] * len(lead) for name in ("sampled", "mask", "advantages", *extras)}
    for k, answer in enumerate(answers):
        tokens += [last, *answer.ids[:-1]]
        own = answer.own
        targets += answer.targets
        lengths.append(len(answer.ids))
        leads.append(0 if lead else -1)
        values["sampled"] += answer.logprobs
        values["mask"] += own
        values["advantages"] += (np.broadcast_to(advantages[k], len(own)) * own).tolist()
        for name, each in extras.items():
            values[name] += list(each[k])
    documents = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    counted = torch.ones(len(lengths))
    counted[: len(lengths) - len(answers)] = 0
    weights, denominators = token_weights(torch.tensor(values["mask"]), documents, counted, normalise, longest)
    of_tokens = {name: np.asarray(each, np.float32) for name, each in values.items()} | {"weights": weights.numpy()}
    return Row(
        np.asarray(tokens, np.int32),
        np.asarray(targets, np.int64),
        np.asarray(lengths, np.int64),
        tuple(leads),
        of_tokens,
        {"counted": denominators.numpy()},
    )


def dealt(rows: Sequence[Row], micro_rows: int, engine: Engine, pad: bool) -> list[tuple[list[int], Batch]]:
    """This process's micro-batches of rows that all processes know: the numbers of their rows, and the batch.

    Every process has equally many; where rows run out, batches of which nothing is learned keep step.
    """
    mesh = engine.mesh
    each = -(-len(rows) // (micro_rows * mesh.dp_size))
    found = []
    for index in mesh.local_shard(each * mesh.dp_size):
        numbers = list(range(len(rows))[index * micro_rows : (index + 1) * micro_rows])
        batch = collate([rows[i] for i in numbers or [0]])
        if pad:
            batch = batch.padded(-(-batch.n_tokens // PADDED_TO) * PADDED_TO)
        found.append((numbers, (batch if numbers else _blank(batch)).to(mesh.device)))
    return found


def _blank(batch: Batch) -> Batch:
    """The same tokens, of which nothing is learned or counted."""
    zeros = {name: torch.zeros_like(x) for name, x in batch.token_extras.items()}
    of_documents = {name: torch.zeros_like(x) for name, x in batch.document_extras.items()}
    return dataclasses.replace(batch.untrained(), token_extras=zeros, document_extras=of_documents)


def evaluated(
    rows: Sequence[Row], micro_rows: int, engine: Engine, pad: bool, function: Callable[[Llama, Batch], Tensor]
) -> list[np.ndarray]:
    """A function's values for the tokens of each row, without gradient, on all processes; in the batches of `dealt`."""
    mine = dealt(rows, micro_rows, engine, pad)
    engine.train(False)
    values = engine.evaluate([batch for _, batch in mine], function)
    engine.train()
    found: dict[int, np.ndarray] = {}
    for (numbers, _), value in zip(mine, values, strict=True):
        at = 0
        for i in numbers:
            n = len(rows[i].tokens)
            found[i] = value[0, at : at + n].cpu().numpy()
            at += n
    if engine.mesh.distributed:
        parts: list[Any] = [None] * engine.mesh.world
        dist.all_gather_object(parts, found)
        found = {i: value for part in parts for i, value in part.items()}
    return [found[i] for i in range(len(rows))]


def with_extra(row: Row, name: str, values: np.ndarray) -> Row:
    """The row with one more value of each token."""
    return dataclasses.replace(row, token_extras={**row.token_extras, name: values.astype(np.float32)})


def logprobs_of(temperature: float) -> Callable[[Llama, Batch], Tensor]:
    """For `evaluated`: the log-probability of each token that was sampled."""

    def function(model: Llama, batch: Batch) -> Tensor:
        hidden = model.model(batch.tokens, batch.layout)
        targets = batch.targets.flatten()
        return token_logprobs(hidden.flatten(0, 1), model.head_weight, targets, temperature=temperature).chosen[None]

    return function


# -- the reference -----------------------------------------------------------------------------------------------------


class Reference:
    """The policy as it was before the run: a new adapter is switched off, anything else is swapped in and out.

    Price: nothing for a new adapter, else one more copy of what is trained.
    """

    def __init__(self, engine: Engine, switched: bool) -> None:
        """switched: whether the policy without its adapter is its reference. Made before anything is restored."""
        self._engine = engine
        self._first = {} if switched else {name: p.detach().clone() for name, p in engine.parameters.items()}

    @contextmanager
    def acting(self) -> Iterator[None]:
        """While the block runs, the engine's model is the reference."""
        if not self._first:
            with self._engine.using_adapter(None):
                yield
            return
        current = {name: p.detach().clone() for name, p in self._engine.parameters.items()}
        self._put(self._first)
        try:
            yield
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._engine.parameters.items():
            p.copy_(values[name])


# -- the objective -----------------------------------------------------------------------------------------------------


@dataclass
class Worst:
    """The token at which sampler and trainer differed most, on this process, since the last look."""

    difference: float = 0.0
    token: int = -1
    sampled: float = 0.0
    trained: float = 0.0

    def look(self, difference: Tensor, targets: Tensor, sampled: Tensor, trained: Tensor) -> None:
        """Take in a batch."""
        i = int(difference.argmax())
        if float(difference[i]) > self.difference:
            self.difference = float(difference[i])
            self.token, self.sampled, self.trained = int(targets[i]), float(sampled[i]), float(trained[i])


@dataclass
class PolicyObjective:
    """What a policy learns from a batch of rows, and what is measured there."""

    config: PolicyConfig
    temperature: float
    worst: Worst = field(default_factory=Worst)

    def __call__(self) -> Objective:
        """As the engine takes it."""
        weights = {"policy": 1.0}
        if self._has_kl:
            weights["kl"] = self.config.kl
        return Objective(self._sums, self._counts, weights)

    @property
    def _has_kl(self) -> bool:
        return self.config.kl > 0 and self.config.kl_in == "loss"

    def _sums(self, model: Llama, batch: Batch) -> dict[str, Tensor]:
        c, targets = self.config, batch.targets.flatten()
        hidden = model.model(batch.tokens, batch.layout)
        found = token_logprobs(
            hidden.flatten(0, 1), model.head_weight, targets, entropy="measured", temperature=self.temperature
        )
        logp, e = found.chosen, {name: x[0] for name, x in batch.token_extras.items()}
        mask, advantages, now = e["mask"], e["advantages"], logp.detach()
        old = e.get("old", now)
        apart = ((old - e["sampled"]) * mask).abs()
        self.worst.look(apart, targets, e["sampled"], old)
        correction = mismatch_weights(old, e["sampled"], c.correction, c.correction_low, c.correction_high)
        ratio = (now - old).exp()
        outside = torch.where(advantages > 0, ratio > 1 + c.clip_high, ratio < 1 - c.clip_low)
        sums = {
            "policy": (e["weights"] * correction * self._loss(logp, old, advantages, mask, batch)).sum(),
            "entropy": (mask * found.entropy).sum(),
            "mismatch": (mask * apart.exp()).sum(),
            "clipped": (mask * outside).sum(),
            "ratio": (mask * ratio).sum(),
        }
        if self._has_kl:
            sums["kl"] = (e["weights"] * kl_estimate(logp, e["reference"], c.kl_kind)).sum()
        return sums

    def _loss(self, logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """The loss of each token."""
        c = self.config
        if c.loss == "gspo":
            return sequence_clipped(logp, old, advantages, batch.documents.document, mask, c.clip_low, c.clip_high)
        if c.loss == "cispo":
            return cispo(logp, old, advantages, high=c.clip_high)
        if c.loss == "dppo":
            return dppo(logp, old, advantages, c.dppo_threshold)
        if c.loss == "reinforce":
            return reinforce(logp, advantages)
        return clipped(logp, old, advantages, c.clip_low, c.clip_high, c.dual_clip)

    def _counts(self, batch: Batch) -> dict[str, float]:
        answers, tokens = float(batch.document_extras["counted"].sum()), float(batch.token_extras["mask"].sum())
        counts = {"policy": answers} | dict.fromkeys(("entropy", "mismatch", "clipped", "ratio"), tokens)
        return counts | ({"kl": answers} if self._has_kl else {})
