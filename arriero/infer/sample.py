"""From logits to the next token of many requests at once: `sample(logits, rows) -> Chosen`.

A request is a `SamplerRow`: its settings, its seed, and its tokens so far. Its filters apply in one order, which is
transformers': logit bias, repetition penalty, presence and frequency penalties, the masks of allowed tokens,
temperature, top-k, top-p, min-p. A token is sampled by inverting the cumulative distribution at one uniform number,
which is a function of the row's seed and of the token's index in the answer (Philox4x64-10). So a row's token, and the
bits of its log-probabilities, depend on nothing but the row and its logits: not on the batch, the threads, or whether
the request was preempted.

The work is done by sample.cpp, on threads of its own that end with the call (torch's operators on a vocabulary wake
OpenMP threads, which then spin on the cores of the next decode step), and by its twin sample_twin.py where there is
no compiler.
Price at V = 49,152: docs/log.md, "Sampling".
Shapes: m rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arriero.errors import UserError
from arriero.infer import sample_twin
from arriero.infer.config import SamplingConfig
from arriero.infer.sampler_row import NativeRow, SamplerRow
from arriero.infer.step import Share
from arriero.system.cpp import load_cpp
from arriero.tokenizer.base import Tokenizer


class NothingAllowed(UserError):
    """No token may follow in some rows, `rows` of the call: their masks and the vocabulary have none in common."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(
            f"rows {list(rows)}: no token may follow, as no id of the tokenizer is in the mask of allowed tokens; "
            "check the grammar or the list of allowed tokens"
        )
        self.rows = list(rows)


_OUT = np.dtype([("id", np.int64), ("raw", np.float32), ("sampled", np.float32)])
"""`Out` in sample.cpp."""


@dataclass(frozen=True)
class Chosen:
    """The tokens of m rows, and how probable they were.

    ids: int64 [m]. raw: fp32 [m], log-softmax of the model's logits at the id, over all V. sampled: fp32 [m], the
    logarithm of the probability in the distribution that was drawn from: after bias, penalties, masks, temperature and
    filters (of greedy rows: after bias, penalties and masks, at temperature 1). NaN where not asked for, and where
    logits are no numbers. top: of each row that asked, (ids, log-probabilities) of the most probable tokens that the
    tokenizer has, the most probable first, equal ones by id; of the distribution that the row's `top_of` names.
    """

    ids: np.ndarray
    raw: np.ndarray
    sampled: np.ndarray
    top: list[tuple[np.ndarray, np.ndarray]]


def sample(logits: Tensor, rows: Sequence[SamplerRow], share: Share | None = None) -> Chosen:
    """The next token of each row, from logits [m, V]; rows are not changed: `SamplerRow.push` the ids.

    Among equal largest logits a greedy row takes the smallest id. top-k and top-p keep all tokens that equal the last
    one kept. Of NaN logits nothing is drawn while others are there; a row without any finite logit (diverged weights)
    draws evenly from its allowed tokens. Raises `NothingAllowed` for rows whose masks allow nothing; then nothing was
    chosen for any.
    """
    return _run(logits, rows, None, share)


def score(logits: Tensor, ids: Sequence[int], row: SamplerRow | None = None, share: Share | None = None) -> Chosen:
    """The raw log-probabilities of given ids [m] by logits [m, V], a prompt's say; `sampled` is NaN.

    row: of the request, whose `n_top` most probable tokens are listed for each position.
    """
    n_top, words = (row.n_top, row.words) if row else (0, None)
    asked = SamplerRow(SamplingConfig(), words=words, seed=0, logprobs=True, n_top=n_top)
    return _run(logits, [asked] * len(ids), ids, share)


def _run(logits: Tensor, rows: Sequence[SamplerRow], given: Sequence[int] | None, share: Share | None) -> Chosen:
    m, vocab = logits.shape
    assert len(rows) == m and vocab < 2**31
    values = logits.detach().to("cpu", torch.float32).contiguous()  # the engine's logits are so already
    n_top = max((row.n_top for row in rows), default=0)
    out = np.empty(m, _OUT)
    top_ids, tops = np.full((m, n_top), -1, np.int32), np.empty((m, n_top), np.float32)
    library = load_library()
    if library is None:
        sample_twin.sample_rows(values, rows, given, out, top_ids, tops)
    else:
        natives = (
            [row.native for row in rows]
            if given is None
            else [_given(row, i) for row, i in zip(rows, given, strict=True)]
        )
        pointers = (ctypes.c_void_p * m)(*map(ctypes.addressof, natives))
        library.sample_rows(
            values.data_ptr(), m, vocab, pointers, out.ctypes.data, top_ids.ctypes.data, tops.ctypes.data, n_top,
            torch.get_num_threads(), *(share[:2] if share else (None, None)),
        )  # fmt: skip
    if len(nothing := np.flatnonzero(out["id"] < 0)):
        raise NothingAllowed(nothing.tolist())
    kept = [int((top_ids[i, : row.n_top] >= 0).sum()) for i, row in enumerate(rows)]
    top = [(top_ids[i, :n], tops[i, :n]) for i, n in enumerate(kept)]
    return Chosen(out["id"], out["raw"], out["sampled"], top)


def _given(row: SamplerRow, token: int) -> NativeRow:
    native = NativeRow.from_buffer_copy(row.native)
    native.given = token
    return native


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The sampler, compiled if need be; None, with a warning, when it cannot be."""
    library = load_cpp(Path(__file__).with_name("sample.cpp"), "sampling through torch")
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.sample_rows.argtypes = [pointer, number, number, *[pointer] * 4, number, number, pointer, pointer]
        library.sample_rows.restype = None
    return library


_WORDS: weakref.WeakKeyDictionary[Tokenizer, np.ndarray] = weakref.WeakKeyDictionary()


def token_words(tokenizer: Tokenizer) -> np.ndarray:
    """Bit mask, int32 words, of the ids that have a token: bit i % 32 of word i / 32 is token i's.

    A model may have more logits (rows that pad its vocabulary), and a tokenizer may have holes: neither is sampled.
    """
    if tokenizer not in _WORDS:
        bits = np.zeros(-(-tokenizer.vocab_size // 32) * 32, np.uint8)
        bits[: tokenizer.vocab_size] = 1
        bits[tokenizer.unused_ids] = 0
        _WORDS[tokenizer] = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
    return _WORDS[tokenizer]
