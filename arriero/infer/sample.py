"""From logits to the next token: small functions, applied in one order.

Each filter takes logits [B, V] and returns them with the excluded ones at -inf; the order is transformers':
repetition penalty, temperature, top-k, top-p, min-p. A token is sampled by inverting the cumulative distribution at one
uniform number from the row's own generator, so a row's text depends on the seed and its index, not on its batch.

Price at V = 49,152 on two cores: 0.1 ms greedy, below 1 ms with all filters (top-p sorts only when it must).
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from arriero.infer.config import SamplingConfig
from arriero.tokenizer.base import Tokenizer

_HEAD = 512  # most probable tokens that top-p looks at before it sorts the whole vocabulary


def usable(logits: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Logits [B, n] of the tokenizer's ids: rows that pad the vocabulary are cut off, ids without a token at -inf."""
    if tokenizer is None:
        return logits
    logits = logits[:, : tokenizer.vocab_size]
    holes = [i for i in tokenizer.unused_ids if i < logits.shape[1]]
    return logits.index_fill(1, torch.tensor(holes, device=logits.device), float("-inf")) if holes else logits


def repetition_penalty(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make the tokens `seen` by each row less probable: l/penalty where l > 0, else l*penalty (arXiv 1909.05858)."""
    out = logits.clone()
    for row, ids in zip(out, seen, strict=True):
        index = torch.tensor(list(set(ids)), device=logits.device)
        row[index] = torch.where(row[index] > 0, row[index] / penalty, row[index] * penalty)
    return out


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and what equals the smallest of them."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most probable tokens whose probabilities reach p in sum, at least one (arXiv 1904.09751)."""
    total = logits.logsumexp(-1, keepdim=True)
    size = min(_HEAD, logits.shape[-1])
    head = logits.topk(size).values
    reached = (head - total).exp().cumsum(-1)
    if size < logits.shape[-1] and bool((reached[:, -1] < p).any()):
        head = logits.sort(-1, descending=True).values
        reached = (head - total).exp().cumsum(-1)
    n_kept = (reached < p).sum(-1, keepdim=True).clamp(max=head.shape[-1] - 1)  # tokens before the one that reaches p
    return logits.masked_fill(logits < head.gather(-1, n_kept), float("-inf"))


def min_p(logits: Tensor, p: float) -> Tensor:
    """Drop tokens whose probability is below p times the largest one (arXiv 2407.01082)."""
    lowest = logits.amax(-1, keepdim=True) + torch.tensor(p, device=logits.device).log()
    return logits.masked_fill(logits < lowest, float("-inf"))


def filtered(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature (which must be above 0), then the filters that the config switches on."""
    logits = logits / config.temperature
    if config.top_k:
        logits = top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = top_p(logits, config.top_p)
    if config.min_p:
        logits = min_p(logits, config.min_p)
    return logits


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch's operators on this thread while the block runs.

    A vocabulary is just long enough for torch to wake its OpenMP threads, which then spin for a while on the cores that
    the next decode step runs on: sampled text came at less than half the speed of greedy (docs/log.md, "Decoding").
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row at which the cumulative probability first exceeds uniform [B] in [0, 1); ids [B].

    Summed in fp64, so that no excluded token can be hit by rounding.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = uniform.double().to(logits.device)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return ids.clamp(max=logits.shape[-1] - 1)  # logits of diverged weights are NaN: some token, but a token


class Sampler:
    """Chooses tokens for rows 0, 1, ...; row i draws from its own generator, seeded with seed + i.

    tokenizer: of its ids alone, and of those only such as have a token; a model may have more rows.
    """

    def __init__(self, config: SamplingConfig, rows: range = range(1), tokenizer: Tokenizer | None = None) -> None:
        self.config, self._tokenizer = config, tokenizer
        self._generators = {row: torch.Generator() for row in rows}
        for row, generator in self._generators.items():
            generator.seed() if config.seed is None else generator.manual_seed(config.seed + row)

    def __call__(self, logits: Tensor, rows: Sequence[int], seen: Sequence[Sequence[int]]) -> Tensor:
        """The next id of each row: logits [B, V], the rows' indices, and the ids they hold so far; returns ids [B]."""
        with one_thread():
            return self._choose(logits, rows, seen)

    def _choose(self, logits: Tensor, rows: Sequence[int], seen: Sequence[Sequence[int]]) -> Tensor:
        logits = usable(logits.float(), self._tokenizer)
        if self.config.repetition_penalty != 1:
            logits = repetition_penalty(logits, seen, self.config.repetition_penalty)
        if self.config.temperature == 0:
            return logits.argmax(-1)
        uniform = torch.cat([torch.rand(1, generator=self._generators[row]) for row in rows])
        return draw(filtered(logits, self.config), uniform)
