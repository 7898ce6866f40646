"""Decoding from a dense cache, a row for each sequence: what kernels.cpp can do, until the engine has a step in C++.

`generate` and `Session` are called by those of generate.py where the C++ step applies. A prompt goes through the model
in one forward (prefill, in torch); then tokens are decoded one at a time. Shapes: B rows, n active rows, T tokens,
V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arriero.infer.config import SamplingConfig
from arriero.infer.kernels import native_step
from arriero.infer.request import Completion
from arriero.infer.sample import Sampler
from arriero.model.cache import KVCache
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer

CHUNK = 512  # tokens of prefill at once: bounds the attention mask, [T, cached]

Step = Callable[[Tensor, Tensor], Tensor]
"""(tokens [n], cache rows [n]) -> logits fp32 [n, V]; the cache grows by one token in these rows."""


def new_cache(model: Llama, batch: int, capacity: int) -> KVCache:
    """A cache in the type that the model computes in."""
    dtype = model.model.compute_dtype or model.model.embed_tokens.weight.dtype
    return KVCache(model.config, batch, capacity, dtype, model.device)


@torch.inference_mode()
def prefill(model: Llama, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Append each prompt to its cache row; returns logits fp32 [B, V] of the token that follows each."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    before, longest = cache.lengths.clone(), int(lengths.max())
    padded = torch.zeros(len(prompts), longest, dtype=torch.long, device=model.device)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    last: Tensor | None = None
    for start in range(0, longest, CHUNK):
        chunk = padded[:, start : start + CHUNK]
        hidden = model.model(chunk, cache.layout(chunk.shape[1]))
        cache.advance(chunk.shape[1])
        at = (lengths - 1 - start).clamp(0, hidden.shape[1] - 1)
        found = hidden[torch.arange(len(prompts), device=model.device), at]
        inside = (lengths > start)[:, None]  # a row that ended in an earlier chunk keeps what it found there
        last = found if last is None else torch.where(inside, found, last)
    assert last is not None, "prefill needs at least one token"
    cache.lengths = before + lengths
    return model.head(last).float()


def keep_beginning(cache: KVCache, held: list[int], ids: Sequence[int]) -> int:
    """Cut a cache of one row, and `held`, the ids in it, back to how `ids` begins too; returns the tokens kept.

    The last of `ids` is never kept: it has to run, for its logits are wanted.
    """
    same = 0
    for old, new in zip(held, ids[:-1], strict=False):
        if old != new:
            break
        same += 1
    del held[same:]
    cache.lengths = torch.full_like(cache.lengths, same)
    return same


def torch_step(model: Llama, cache: KVCache) -> Step:
    """The slow twin of the C++ step, for every device and type: all rows go through, idle ones are not counted."""

    @torch.inference_mode()
    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        everyone = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=model.device)
        everyone[rows, 0] = tokens
        logits = model(everyone, cache.layout(1))[rows, 0].float()
        cache.lengths[rows] += 1
        return logits

    return step


def serves(model: Llama) -> bool:
    """Whether the C++ step applies to the model."""
    return native_step(model, new_cache(model, 1, 1)) is not None


def decode_step(model: Llama, cache: KVCache) -> Step:
    """The fastest step for this model and cache. Make it anew after the model's tensors were replaced."""
    return native_step(model, cache) or torch_step(model, cache)


@torch.inference_mode()
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008  frozen
    max_new_tokens: int = 256,
    *,
    stop_ids: Collection[int] | None = None,
    batch: int = 16,
    on_done: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """See `arriero.infer.generate.generate`, which has checked the prompts."""
    stops = tokenizer.stop_ids if stop_ids is None else stop_ids
    sampler = Sampler(sampling, range(len(prompts)), tokenizer)
    answers: list[Completion | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [
            _Sequence(i, list(prompts[i]), min(max_new_tokens, model.config.max_context - len(prompts[i])))
            for i in chosen
        ]
        for row in _decode(model, rows, sampler, frozenset(stops)):
            answers[row.index] = Completion(row.new, tokenizer.decode(row.new), "stop" if row.stopped else "length")
            on_done()
    return [answer for answer in answers if answer is not None]


@dataclass
class _Sequence:
    index: int  # of the prompt
    ids: list[int]  # prompt and answer
    room: int  # tokens that the answer may have
    new: list[int] = field(default_factory=list)
    stopped: bool = False

    def take(self, token: int, stops: frozenset[int]) -> bool:
        """Add a token; returns whether the row goes on."""
        self.stopped = token in stops
        if not self.stopped:
            self.new.append(token)
            self.ids.append(token)
        return not self.stopped and len(self.new) < self.room


def _decode(model: Llama, rows: list[_Sequence], sampler: Sampler, stops: frozenset[int]) -> Iterator[_Sequence]:
    """Run one batch to its end; yields each row as it finishes."""
    cache = new_cache(model, len(rows), max(len(row.ids) + row.room for row in rows))
    logits = prefill(model, cache, [row.ids for row in rows])
    step = decode_step(model, cache)
    active = list(range(len(rows)))
    while True:
        tokens = sampler(logits, [rows[i].index for i in active], [rows[i].ids for i in active]).tolist()
        going = []
        for i, token in zip(active, tokens, strict=True):
            if rows[i].take(token, stops):
                going.append(i)
            else:
                yield rows[i]
        if not going:
            return
        active = going
        last = torch.tensor([rows[i].ids[-1] for i in active], device=model.device)
        logits = step(last, torch.tensor(active, device=model.device))


class Session:
    """One conversation's cache: each call of `tokens` reuses what it shares with the call before.

    The model's tensors are looked up at construction; after training or moving it, make a new session.
    """

    def __init__(self, model: Llama, context: int = 0) -> None:
        """context: tokens of capacity; 0 means the model's own context, at most 8192."""
        self.model = model
        self.context = min(context or 8192, model.config.max_context)
        self.ids: list[int] = []  # what the cache holds
        self.reused = 0  # tokens of the last prompt that were in the cache already
        self.prefill_seconds = 0.0
        self._cache = new_cache(self.model, 1, self.context)
        self._step = decode_step(self.model, self._cache)

    @torch.inference_mode()
    def tokens(
        self, ids: Sequence[int], sampler: Sampler, max_new_tokens: int, stop_ids: Collection[int]
    ) -> Generator[int, None, None]:
        """Yield the tokens that follow `ids`; a stop token ends them and is yielded too.

        May be left at any point, or interrupted: the cache then holds what `self.ids` says.
        """
        logits = self._read(ids)
        seen, row = list(ids), torch.zeros(1, dtype=torch.long, device=self.model.device)
        for i in range(min(max_new_tokens, self.context - len(ids))):
            if i:
                logits = self._step(torch.tensor(seen[-1:], device=self.model.device), row)
                self.ids.append(seen[-1])
            token = int(sampler(logits, [0], [seen]))
            seen.append(token)
            yield token
            if token in stop_ids:
                return

    def _read(self, ids: Sequence[int]) -> Tensor:
        """Bring the cache to hold exactly `ids`; returns the logits [1, V] of what follows."""
        began = time.perf_counter()
        self.reused = keep_beginning(self._cache, self.ids, ids)
        logits = prefill(self.model, self._cache, [ids[self.reused :]])
        self.ids += ids[self.reused :]
        self.prefill_seconds = time.perf_counter() - began
        return logits
