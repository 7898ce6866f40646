"""How far a model's predictions are from those of another one that it was made of: quantised against whole.

At every position of a text both give a distribution of the next token, p (the original) and q. Reported are perplexity
and bits per byte of both, the mean of KL(p || q) = sum p log(p / q) in nats, and how often the most probable token is
the same. The KL divergence sees what perplexity, which looks at one token, averages out (arXiv 2407.09141).

Both models run layer by layer from their files (checkpoint/layers.py), so neither lies in memory whole; logits of
[chunk, V] exist at a time. Computed in fp32. Windows as in perplexity.py.
Shapes: N scored positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from arriero.checkpoint.layers import block_of, embedded, normed, run
from arriero.checkpoint.load import load_tokenizer_at, open_weights
from arriero.checkpoint.source import resolve
from arriero.checkpoint.weights import Weights
from arriero.errors import DataError
from arriero.eval.perplexity import Window, windows
from arriero.io.files import read_text
from arriero.io.records import parse_row, read_records, source_files
from arriero.losses.lm import IGNORED
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.show.progress import progress
from arriero.tokenizer.base import Tokenizer

_CHUNK = 256  # positions whose logits exist at a time


@dataclass(frozen=True)
class Divergence:
    """What a text says of two models; nats and bits a token or byte, kl_error: standard error of the mean KL."""

    tokens: int
    perplexity: tuple[float, float]  # of the original, of the other
    bits_per_byte: tuple[float, float]
    kl: float
    kl_error: float
    same_top: float  # share of the positions at which both have the same most probable token


def divergence(
    original: Weights,
    other: Weights,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int = 2048,
    context: int = 512,
    known: Tensor | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Divergence:
    """Compare two models of one tokenizer on texts; window and context as in `perplexity`.

    known: the original's `final_states` of these texts, where it is compared with several. on_layer: called after each
    layer of each model. Raises `DataError` where there is nothing to score.
    """
    views = views_of(original, tokenizer, texts, window, context)
    hidden = [
        final_states(original, views, on_layer) if known is None else known,
        final_states(other, views, on_layer),
    ]
    targets = torch.tensor([target for view in views for target in view.targets if target != IGNORED])
    sums = torch.zeros(4, dtype=torch.float64)
    n = len(targets)
    squares = 0.0
    for kl, nats, same in _positions(original, other, hidden, targets):
        sums += torch.stack([nats[0].sum(), nats[1].sum(), kl.sum(), same.sum()]).double()
        squares += float(kl.double().square().sum())
    n_bytes = sum(view.bytes for view in views)
    mean = float(sums[2]) / n
    return Divergence(
        n,
        (math.exp(float(sums[0]) / n), math.exp(float(sums[1]) / n)),
        (float(sums[0]) / math.log(2) / n_bytes, float(sums[1]) / math.log(2) / n_bytes),
        mean,
        math.sqrt(max(0.0, squares / n - mean * mean) / n),
        float(sums[3]) / n,
    )


def views_of(
    weights: Weights, tokenizer: Tokenizer, texts: Sequence[str], window: int = 2048, context: int = 512
) -> list[Window]:
    """The windows that texts are read in; raises `DataError` where there are none."""
    window = min(window, weights.config.max_context)
    views = [v for text in texts for v in windows(tokenizer, text, window, min(context, window - 1))]
    if not views:
        raise DataError("validation: the data holds no text to score; give at least one text that is not empty")
    return views


@torch.no_grad()
def final_states(weights: Weights, views: Sequence[Window], on_layer: Callable[[], None] = lambda: None) -> Tensor:
    """What the head of a model is given at each scored position [N, D], fp32."""
    config = weights.config
    hidden = embedded(weights, [torch.tensor([view.inputs]) for view in views])
    for layer in range(config.n_layers):
        block = block_of(config, layer, weights.read)
        hidden = [run(block, config, layer, x) for x in hidden]
        on_layer()
    scored = [torch.tensor(view.targets) != IGNORED for view in views]
    return normed(weights, torch.cat([x[0, at] for x, at in zip(hidden, scored, strict=True)]))


@torch.no_grad()
def _positions(
    original: Weights, other: Weights, hidden: Sequence[Tensor], targets: Tensor
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:
    """By chunks of positions: KL(p || q), nats of the target under p and q, and whether the top token is the same."""
    heads = [_head(weights) for weights in (original, other)]
    for start in range(0, len(targets), _CHUNK):
        at = slice(start, start + _CHUNK)
        p, q = ((x[at] @ head.T).log_softmax(-1) for x, head in zip(hidden, heads, strict=True))
        nats = tuple(-logits.gather(1, targets[at, None])[:, 0] for logits in (p, q))
        yield (p.exp() * (p - q)).sum(-1), (nats[0], nats[1]), (p.argmax(-1) == q.argmax(-1)).float()


def _head(weights: Weights) -> Tensor:
    return weights.read(EMBEDDINGS if weights.config.tied_embeddings else HEAD).float()


def compare(model: str | Path, other: str | Path, texts: Sequence[str]) -> Divergence:
    """Compare the model `other` with `model`, of which it was made, on texts."""
    original, made = (open_weights(resolve(name)) for name in (model, other))
    total = original.config.n_layers + made.config.n_layers
    with progress(f"comparing with {Path(model).name}", total) as bar:
        return divergence(original, made, load_tokenizer_at(resolve(model)), texts, on_layer=bar.advance)


def read_texts(file: str | Path) -> list[str]:
    """The texts of a .txt file, or of rows with a column "text"; raises `DataError` where there are none."""
    if Path(file).suffix == ".txt":
        return [read_text(Path(file))]
    records = (record for found in source_files(file) for record in read_records(found))
    texts = []
    for record in records:
        text = parse_row(record).get("text")
        if not isinstance(text, str):
            raise DataError(f"row {record.row} of {record.file}: no text in a column 'text'; validation needs one")
        texts.append(text)
    return texts


def divergence_table(found: Divergence, name: str) -> Table:
    """The numbers of `compare`, for a terminal."""
    table = Table(f"{found.tokens:,} tokens of {name}", "before", "after", "difference")
    (ppl, ppl_after), (bits, bits_after) = found.perplexity, found.bits_per_byte
    table.add_row("perplexity", f"{ppl:.3f}", f"{ppl_after:.3f}", f"{ppl_after / ppl - 1:+.2%}")
    table.add_row("bits per byte", f"{bits:.4f}", f"{bits_after:.4f}", f"{bits_after - bits:+.4f}")
    table.add_row("KL divergence, nats a token", "", "", f"{found.kl:.5f} ± {1.96 * found.kl_error:.5f}")
    table.add_row("same most probable token", "", "", f"{found.same_top:.2%}")
    return table
