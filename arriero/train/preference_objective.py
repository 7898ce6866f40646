"""Objectives of preferences: from a batch of answers behind their prompts to sums over pairs or answers.

Terms: `preference` a pair (kto: an answer), and `nll`, the better answers' negative log-likelihood per token, a prompt.
Beside them are recorded, a pair or an answer: log-probabilities, implicit rewards beta (log pi - log pi_ref), their
margin, and the share of pairs in which the better answer has the higher one (without a reference, of the
log-probabilities per token).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arriero.data.batch import IGNORED, Batch
from arriero.data.preference_loader import Pairs, compared, n_answers, n_best, n_pairs
from arriero.distributed.objective import Objective
from arriero.losses import preference as losses
from arriero.losses.lm import token_logprobs
from arriero.model.llama import Llama
from arriero.train.preference_config import REFERENCE_FREE, DpoConfig, OnlineDpoConfig

AnyDpo = DpoConfig | OnlineDpoConfig


def scored_logprobs(model: Llama, batch: Batch) -> Tensor:
    """log p of each token that counts in a preference, 0 elsewhere, [1, N]."""
    return _logprobs(model, batch) * batch.token_extras["scored"]


def _logprobs(model: Llama, batch: Batch) -> Tensor:
    hidden = model.model(batch.tokens, batch.layout)
    return token_logprobs(hidden.flatten(0, 1), model.head.weight, batch.targets.flatten()).chosen[None]


def preference_objective(config: AnyDpo) -> Objective:
    """The objective of `config`: a loss of pairs, or kto's of answers."""
    weights = {"preference": config.beta if config.loss == "orpo" else 1.0}
    if config.nll:
        weights["nll"] = config.nll
    kto = isinstance(config, DpoConfig) and config.loss == "kto"
    sums, count = (_of_answers(config), n_answers) if kto else (_of_pairs(config), n_pairs)
    return Objective(sums, lambda batch: _counts(batch, count, config), weights)


def _counts(batch: Batch, count: Callable[[Batch], int], config: AnyDpo) -> dict[str, float]:
    n = float(count(batch))
    if config.loss == "kto":
        good = float((batch.document_extras["value"] > 0).sum())
        of_good = {"good_logp": good, "good_reward": good}
        return {"preference": n, **of_good, **{name.replace("good", "bad"): n - good for name in of_good}}
    names = ("preference", "chosen_logp", "rejected_logp", "margin", "accuracy")
    rewards = () if config.loss in REFERENCE_FREE else ("chosen_reward", "rejected_reward")
    nll = {"nll": float(n_best(batch))} if config.nll else {}
    return {**dict.fromkeys((*names, *rewards), n), **nll}


def _of_pairs(config: AnyDpo) -> Callable[[Llama, Batch], dict[str, Tensor]]:
    free = config.loss in REFERENCE_FREE
    averaged = free or config.loss in ("sigmoid-norm", "ipo")

    def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
        logprobs = _logprobs(model, batch)
        scored, counted = batch.document_sums(logprobs * batch.token_extras["scored"])
        lengths, _ = batch.document_sums(batch.token_extras["scored"])
        values = scored if free else scored - batch.document_extras["reference"]
        compare = losses.per_token(values, lengths) if averaged else values
        pairs = compared(batch.document_extras)
        once = counted[pairs.better].to(values.dtype)
        better, worse = compare[pairs.better], compare[pairs.worse]
        found = {"preference": (_loss(config, better, worse) * once).sum()}
        if config.nll:
            found["nll"] = _nll(logprobs, batch, counted)
        with torch.no_grad():
            found |= _recorded(config, scored, compare if free else values, pairs, once)
        return found

    return sums


def _loss(config: AnyDpo, better: Tensor, worse: Tensor) -> Tensor:
    """The loss of each pair, [m]."""
    if config.loss == "ipo":
        return losses.ipo(better, worse, config.beta)
    if config.loss == "simpo":
        return losses.simpo(better, worse, config.beta, config.gamma)
    if config.loss == "orpo":
        return losses.orpo(better, worse)
    return losses.dpo(better, worse, config.beta, config.smoothing)


def _nll(logprobs: Tensor, batch: Batch, counted: Tensor) -> Tensor:
    """The mean over each best answer's tokens, format tokens too, summed over the prompts (arXiv 2404.19733)."""
    total, _ = batch.document_sums(logprobs)
    lengths, _ = batch.document_sums((batch.targets != IGNORED).to(logprobs.dtype))
    return -(losses.per_token(total, lengths) * batch.document_extras["best"] * counted).sum()


def _recorded(config: AnyDpo, scored: Tensor, values: Tensor, pairs: Pairs, once: Tensor) -> dict[str, Tensor]:
    rewards = config.beta * values
    better, worse = rewards[pairs.better], rewards[pairs.worse]
    found = {
        "chosen_logp": scored[pairs.better],
        "rejected_logp": scored[pairs.worse],
        "margin": better - worse,
        "accuracy": (better > worse).to(once.dtype),
    }
    if config.loss not in REFERENCE_FREE:
        found |= {"chosen_reward": better, "rejected_reward": worse}
    return {name: (of_pair * once).sum() for name, of_pair in found.items()}


def _of_answers(config: AnyDpo) -> Callable[[Llama, Batch], dict[str, Tensor]]:
    assert isinstance(config, DpoConfig), "answers to one prompt that are sampled together are compared"

    def sums(model: Llama, batch: Batch) -> dict[str, Tensor]:
        extras = batch.document_extras
        scored, counted = batch.document_sums(scored_logprobs(model, batch))
        ratio, good = scored - extras["reference"], extras["value"] > 0
        mine = counted.to(ratio.dtype) * (extras["answer"] > 0)
        point = extras["reference_point"]
        loss = losses.kto(ratio, good, point, config.beta, config.good_weight, config.bad_weight)
        with torch.no_grad():
            of = {"good": mine * good, "bad": mine * ~good}
            recorded = {f"{name}_logp": (scored * which).sum() for name, which in of.items()}
            recorded |= {f"{name}_reward": (config.beta * ratio * which).sum() for name, which in of.items()}
        return {"preference": (loss * mine).sum(), **recorded}

    return sums
