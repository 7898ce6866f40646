"""A request as the sampler sees it: its settings, its seed, its tokens so far, and the mask of what may follow."""

from __future__ import annotations

import copy
import ctypes
import math
import secrets
from collections.abc import Sequence
from typing import Literal

import numpy as np

from arriero.infer.config import SamplingConfig


class NativeRow(ctypes.Structure):
    """`Row` in sample.cpp."""

    _fields_ = [
        ("top_p", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("temperature", "log_min_p", "repetition", "presence", "frequency")),
        *((name, ctypes.c_int32) for name in ("top_k", "n_top", "wants_logprobs", "top_of_sampled")),
        ("given", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ("seed", "index")),
        *((name, ctypes.c_void_p) for name in ("words", "allowed")),
        *((name, ctypes.c_int64) for name in ("n_words", "n_allowed")),
        ("tokens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_prompt", "n_tokens")),
        *((name, ctypes.c_void_p) for name in ("bias_ids", "bias")),
        ("n_bias", ctypes.c_int64),
    ]


class SamplerRow:
    """What decides the next token of a request, except its logits.

    sampling: the settings; `seed` stands for its seed where one is given. prompt, answer: token ids so far.
    words: bit mask of the ids that have a token, as `sample.token_words` makes it; None for all.
    logprobs: whether the chosen token's log-probabilities are wanted. n_top, top_of: how many most probable tokens to
    list, of which distribution (`sample.Chosen` defines both).
    `index` is that of the next token, which its random number depends on: the length of the answer, unless it is set.
    `allowed` is set by whoever constrains the next token: int32 words, of which bit i % 32 of word i / 32 allows
    token i; None allows all.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        prompt: Sequence[int] = (),
        *,
        seed: int | None = None,
        answer: Sequence[int] = (),
        words: np.ndarray | None = None,
        logprobs: bool = False,
        n_top: int = 0,
        top_of: Literal["raw", "sampled"] = "raw",
    ) -> None:
        chosen = seed if seed is not None else sampling.seed
        self.seed = (secrets.randbits(64) if chosen is None else chosen) % 2**64
        self.words, self.logprobs, self.n_top, self.top_of = words, logprobs, n_top, top_of
        self._allowed: np.ndarray | None = None
        self._tokens = np.array([*prompt, *answer], np.int32)
        self._n_prompt, self._n = len(prompt), len(prompt) + len(answer)
        self.native = NativeRow(given=-1, seed=self.seed, index=len(answer))
        self.native.n_top, self.native.wants_logprobs = n_top, logprobs
        self.native.top_of_sampled = top_of == "sampled"
        if words is not None:
            self.native.words, self.native.n_words = words.ctypes.data, len(words)
        self.sampling = sampling
        self._point_at_tokens()

    @property
    def sampling(self) -> SamplingConfig:
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        self._sampling, native = sampling, self.native
        native.temperature, native.top_k, native.top_p = sampling.temperature, sampling.top_k, sampling.top_p
        native.log_min_p = log_of(sampling.min_p)
        native.repetition = sampling.repetition_penalty
        native.presence, native.frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int32)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        native.bias_ids, native.bias = self._bias_ids.ctypes.data, self._bias.ctypes.data
        native.n_bias = len(self._bias)

    @property
    def index(self) -> int:
        return int(self.native.index)

    @index.setter
    def index(self, index: int) -> None:
        self.native.index = index

    @property
    def allowed(self) -> np.ndarray | None:
        return self._allowed

    @allowed.setter
    def allowed(self, words: np.ndarray | None) -> None:
        assert words is None or (words.dtype.itemsize == 4 and words.ndim == 1 and words.flags.c_contiguous)
        self._allowed = words
        self.native.allowed = None if words is None else words.ctypes.data
        self.native.n_allowed = 0 if words is None else len(words)

    @property
    def prompt(self) -> np.ndarray:
        return self._tokens[: self._n_prompt]

    @property
    def answer(self) -> np.ndarray:
        return self._tokens[self._n_prompt : self._n]

    def ahead(self, proposed: Sequence[int]) -> list[SamplerRow]:
        """Rows as this one is now, and as it would be with the first, the first two, ... of the proposed tokens pushed.

        They share its memory: they are good until it is pushed to.
        """
        self._reserve(len(proposed))
        self._tokens[self._n : self._n + len(proposed)] = proposed
        rows = []
        for n in range(len(proposed) + 1):
            rows.append(row := copy.copy(self))
            row.native = NativeRow.from_buffer_copy(self.native)
            row._n = row.native.n_tokens = self._n + n
            row.index = self.index + n
        return rows

    def push(self, token: int) -> None:
        """Append a token to the answer."""
        self._reserve(1)
        self._tokens[self._n] = token
        self._n += 1
        self.native.n_tokens, self.index = self._n, self.index + 1

    def _reserve(self, n: int) -> None:
        if self._n + n > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros(max(64, n, self._n), np.int32)])
            self._point_at_tokens()

    def _point_at_tokens(self) -> None:
        self.native.tokens, self.native.n_prompt = self._tokens.ctypes.data, self._n_prompt
        self.native.n_tokens = self._n


def log_of(p: float) -> float:
    """The logarithm, as min-p uses it: rounded to fp32; of 0, -inf."""
    return float(np.float32(math.log(p))) if p > 0 else -math.inf
