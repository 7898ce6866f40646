"""Perplexity and bits per byte of texts of any length, in bounded memory.

A text longer than the window is read in overlapping windows. Each token is scored exactly once, and after the
first window with at least `context` tokens before it. A text is preceded by the tokenizer's bos token (its eos
where it has no bos), as in lm-eval's rolling log-likelihood, so that its first token is scored as well; where there is
neither, its first token is not, and its bytes do not count.
Perplexity is per token and comparable only between models with the same tokenizer; bits per byte (UTF-8) always is.
Price: one forward over n * window / (window - context + 1) tokens; [chunk, V] logits at a time, never [window, V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from arriero.errors import DataError
from arriero.eval.bootstrap import Ratio
from arriero.eval.packed import scored
from arriero.losses.lm import IGNORED
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer, utf8


@dataclass(frozen=True)
class Window:
    """A stretch of one text: ids read, ids to follow (-100 where an earlier window has scored them), its share."""

    inputs: list[int]
    targets: list[int]
    scored: int  # tokens scored here
    bytes: float  # of the tokens scored here
    document: int  # the number of its text, from 0


@dataclass(frozen=True)
class Perplexity:
    """What texts cost a model, kept by window so that windows can be resampled.

    bits, tokens, bytes: by window, what its scored tokens cost, their number, and their bytes.
    document: by window, the number of its text, from 0; a text of which nothing is scored has no window.
    """

    bits: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    document: np.ndarray

    @property
    def documents(self) -> int:
        """Texts of which something is scored."""
        return len(np.unique(self.document))

    @property
    def bits_per_token(self) -> Ratio:
        """-log2 p of a token, on average."""
        return Ratio(self.bits, self.tokens)

    @property
    def bits_per_byte(self) -> Ratio:
        """-log2 p of the text over its bytes: comparable between tokenizers."""
        return Ratio(self.bits, self.bytes)

    def bits_per_byte_by(self, sources: Sequence[str]) -> dict[str, Ratio]:
        """Bits per byte of each source, the largest first; `sources` names that of each text.

        A source of which no byte is scored is left out.
        """
        windows: dict[str, list[int]] = {}
        for i, document in enumerate(self.document):
            windows.setdefault(sources[document], []).append(i)
        found = {name: Ratio(self.bits[which], self.bytes[which]) for name, which in windows.items()}
        sizes = {name: ratio.under.sum() for name, ratio in found.items()}
        return {name: found[name] for name in sorted(sizes, key=lambda name: -sizes[name]) if sizes[name]}

    @property
    def perplexity(self) -> Ratio:
        """2 to the bits per token, which is exp of the mean of -log p."""
        return Ratio(self.bits, self.tokens, exponent=True)


def perplexity(
    model: Llama,
    tokenizer: Tokenizer,
    texts: str | Iterable[str],
    *,
    window: int = 2048,
    context: int = 512,
    on_bytes: Callable[[float], None] = lambda n: None,
) -> Perplexity:
    """Score every token of `texts` (one, or a stream of documents) once; see the module's text for how.

    window: tokens a forward, capped by the model's context. context: fewest tokens before a scored one where
    the text has them; at most half of a window that is capped, or nearly every token would cost a forward of its own.
    on_bytes: called with the bytes of text scored, for a progress bar.
    Raises `DataError` when there is nothing to score.
    """
    if window > model.config.max_context:
        window = model.config.max_context
        context = min(context, window // 2)
    context = min(context, window - 1)
    documents = [texts] if isinstance(texts, str) else texts
    views = (view for i, text in enumerate(documents) for view in windows(tokenizer, text, window, context, i))
    found: list[tuple[float, int, float]] = []
    document: list[int] = []
    for view, bits in scored(model, views, window):
        found.append((bits, view.scored, view.bytes))
        document.append(view.document)
        on_bytes(view.bytes)
    if not found:
        raise DataError("perplexity: the data holds no text to score; give at least one text that is not empty")
    bits_, tokens, sizes = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    return Perplexity(bits_, tokens, sizes, np.array(document))


def windows(tokenizer: Tokenizer, text: str, window: int, context: int, document: int = 0) -> Iterator[Window]:
    """Cut text number `document` into windows of at most `window` inputs that score each token once; see the module's
    text."""
    prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = tokenizer.encode(text)
    sizes = tokenizer.text_bytes(ids, len(utf8(text)))
    if prefix is not None:
        ids, sizes = [prefix, *ids], np.append(0, sizes)
    n_inputs = len(ids) - 1
    start = first = 0  # the window reads inputs from start on, and scores from first on
    while first < n_inputs:
        end = min(start + window, n_inputs)
        targets = [IGNORED] * (first - start) + ids[first + 1 : end + 1]
        yield Window(ids[start:end], targets, end - first, float(sizes[first + 1 : end + 1].sum()), document)
        first, start = end, end - context + 1
