"""The sampler in torch: small functions on the logits of one row, applied in one order. The slow twin of sample.cpp.

Filters take logits [V] and return them with the excluded ones at -inf. Probabilities are summed in fp64, so that no
excluded token is hit by rounding. For equal uniform numbers it chooses what sample.cpp chooses; log-probabilities agree
within 1e-5.
Shapes: m rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arriero.infer.config import SamplingConfig
from arriero.infer.sampler_row import SamplerRow, log_of

HIGHEST = 1e30
"""Stands for a logit of +inf."""
_WORD = 2**64


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a token: Philox4x64-10 (Salmon et al. 2011) under key `seed` at counter `index`.

    The first word of the block, as a double of 53 bits; `numpy.random.Philox` gives the same.
    """
    counter, key = [index % _WORD, 0, 0, 0], [seed % _WORD, 0]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [b // _WORD ^ counter[1] ^ key[0], b % _WORD, a // _WORD ^ counter[3] ^ key[1], a % _WORD]
        key = [(key[0] + 0x9E3779B97F4A7C15) % _WORD, (key[1] + 0xBB67AE8584CAA73B) % _WORD]
    return (counter[0] >> 11) * 2.0**-53


def repetition_penalty(logits: Tensor, seen: Sequence[int] | np.ndarray, penalty: float) -> Tensor:
    """Make the tokens `seen` less probable: l/penalty where l > 0, else l*penalty (arXiv 1909.05858)."""
    out, index = logits.clone(), torch.tensor(np.unique(np.asarray(seen, np.int64)))
    index = index[index < len(out)]
    out[index] = torch.where(out[index] > 0, out[index] / penalty, out[index] * penalty)
    return out


def count_penalties(logits: Tensor, answer: Sequence[int] | np.ndarray, presence: float, frequency: float) -> Tensor:
    """Take presence + frequency * n off the logit of a token that the answer has n times (OpenAI's definition)."""
    counts = torch.from_numpy(np.bincount(np.asarray(answer, np.int64), minlength=len(logits)))[: len(logits)].double()
    taken = torch.tensor(frequency).double() * counts + torch.tensor(presence).double()
    return torch.where(counts > 0, logits.double() - taken, logits.double()).float()


def allowed_only(logits: Tensor, words: np.ndarray | None) -> Tensor:
    """Keep the tokens whose bit is set: bit i % 32 of word i / 32 is token i's; what the mask does not reach is not."""
    if words is None:
        return logits
    bits = np.unpackbits(np.ascontiguousarray(words).astype("<i4").view(np.uint8), bitorder="little")[: len(logits)]
    kept = torch.zeros(len(logits), dtype=torch.bool)
    kept[: len(bits)] = torch.from_numpy(bits.astype(bool))
    return logits.masked_fill(~kept, -math.inf)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and what equals the smallest of them."""
    return logits.masked_fill(logits < logits.topk(min(k, len(logits))).values[-1], -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most probable tokens whose probabilities reach p in sum, and what equals the last of them.

    At least one (arXiv 1904.09751).
    """
    head = logits.sort(descending=True).values
    reached = head.double().softmax(-1).cumsum(-1)
    n_kept = int((reached < p).sum().clamp(max=len(head) - 1))  # tokens before the one that reaches p
    return logits.masked_fill(logits < head[n_kept], -math.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Drop tokens whose probability is below p times the largest one (arXiv 2407.01082)."""
    return logits.masked_fill(logits < logits.amax() + log_of(p), -math.inf)


def filtered(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature (which must be above 0), then the filters that the config switches on."""
    logits = (logits / config.temperature).clamp(max=HIGHEST)
    if config.top_k:
        logits = top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = top_p(logits, config.top_p)
    if config.min_p:
        logits = min_p(logits, config.min_p)
    return logits


def draw(logits: Tensor, number: float) -> int:
    """The token at which the cumulative probability first exceeds `number`, in [0, 1)."""
    weights = (logits.double() - logits.amax()).exp()
    cumulative = weights.cumsum(-1)
    at = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    return min(at, int(weights.nonzero()[-1]))


def penalised(logits: Tensor, row: SamplerRow) -> Tensor:
    """The row's bias, penalties and masks on its logits [V], of which none is NaN or +inf."""
    config = row.sampling
    if config.logit_bias:
        bias = {token: value for token, value in config.logit_bias.items() if token < len(logits)}
        logits = logits.index_add(0, torch.tensor([*bias], dtype=torch.long), torch.tensor([*bias.values()]))
    if config.repetition_penalty != 1:
        logits = repetition_penalty(logits, [*row.prompt, *row.answer], config.repetition_penalty)
    if config.presence_penalty or config.frequency_penalty:
        logits = count_penalties(logits, row.answer, config.presence_penalty, config.frequency_penalty)
    return allowed_only(allowed_only(logits, row.words), row.allowed)


def best(logits: Tensor, logprobs: Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest logits that are tokens, equal ones by id: their ids and log-probabilities."""
    order = logits.sort(descending=True, stable=True)
    ids = order.indices[order.values > -math.inf][:n]
    return ids.numpy(), logprobs[ids].float().numpy()


def sample_rows(
    logits: Tensor,
    rows: Sequence[SamplerRow],
    given: Sequence[int] | None,
    out: np.ndarray,
    top_ids: np.ndarray,
    tops: np.ndarray,
) -> None:
    """As `sample_rows` of sample.cpp: fills `out` and the most probable tokens; id -1 where nothing is allowed."""
    for i, row in enumerate(rows):
        raw = logits[i].double().log_softmax(-1)
        plain = logits[i].nan_to_num(nan=-math.inf, posinf=HIGHEST, neginf=-math.inf)
        out[i] = (-1, math.nan, math.nan)
        if row.n_top and row.top_of == "raw":
            ids, values = best(allowed_only(plain, row.words), raw, row.n_top)
            top_ids[i, : len(ids)], tops[i, : len(ids)] = ids, values
        if given is not None:
            out[i]["id"] = given[i]
        else:
            _choose(plain, row, out[i], top_ids[i], tops[i])
        if row.logprobs and 0 <= out[i]["id"] < len(raw):
            out[i]["raw"] = raw[out[i]["id"]]


def _choose(logits: Tensor, row: SamplerRow, out: np.ndarray, top_ids: np.ndarray, tops: np.ndarray) -> None:
    logits = penalised(logits, row)
    finite = logits > -math.inf
    if not finite.any():  # diverged weights: the allowed tokens become equally likely
        logits = allowed_only(allowed_only(torch.zeros_like(logits), row.words), row.allowed)
        if not (logits > -math.inf).any():
            return
    if row.sampling.temperature == 0:
        kept = logits
        out["id"] = int((logits == logits.amax()).nonzero()[0])
    else:
        kept = filtered(logits, row.sampling)
        out["id"] = draw(kept, uniform(row.seed, row.index))
    logprobs = kept.double().log_softmax(-1) if finite.any() else torch.full_like(kept, math.nan)
    if row.logprobs:
        out["sampled"] = logprobs[out["id"]]
    if row.n_top and row.top_of == "sampled":
        ids, values = best(kept, logprobs, row.n_top)
        top_ids[: len(ids)], tops[: len(ids)] = ids, values
