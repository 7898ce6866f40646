"""Rounds a model's matrices by what a text makes them multiply (quant/calibrated.py), one layer at a time.

A layer is run on the text as the layers before it, rounded already, hand it on, so its rounding knows of theirs; sums
of x x^T are gathered from the inputs of its matrices, which are rounded by them, and the layer is run again, rounded.
Held at a time: one layer in fp32, its sums (the largest: the width of the feed-forward squared), and the hidden states.

Without a file the text is Python's own reference manual (the module pydoc_data.topics, 465,000 characters of prose and
code, on every machine); a file of the kind that the model is for does better.
Shapes: B rows, T tokens, D width, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arriero.checkpoint.layers import block_of, embedded, normed, run
from arriero.checkpoint.weights import Weights
from arriero.data.formats import Conversation, parse_record
from arriero.errors import DataError
from arriero.io.files import read_text
from arriero.io.records import parse_row, read_records, source_files
from arriero.model.linear import named_products
from arriero.model.llama import HEAD
from arriero.quant.calibrated import calibrated, output_error
from arriero.quant.packed import Quantized
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat

LENGTH = 512  # tokens of a row
TOKENS = 16_384  # of the text that is used
_AT_ONCE = 4  # rows


class Calibration:
    """The matrices of a model, each rounded when its turn comes: they have to be asked for in the model's order.

    kinds: of the matrices to round, by name ("int8" or "int4"). rows: ids [B, T]. said(text): what is going on.
    """

    def __init__(
        self, weights: Weights, kinds: Mapping[str, str], rows: Tensor, said: Callable[[str], None] = lambda text: None
    ) -> None:
        self._weights, self._kinds, self._said = weights, kinds, said
        self._hidden = embedded(weights, rows.split(_AT_ONCE))
        self._done: dict[str, tuple[Quantized, float]] = {}
        self._layer = 0

    def packed(self, name: str) -> tuple[Quantized, float]:
        """A matrix after rounding, and the error of its outputs, ||W' X - W X|| / ||W X||."""
        while name not in self._done:
            assert self._layer <= self._weights.config.n_layers, f"{name} comes after the head"
            self._done.clear()
            if self._layer < self._weights.config.n_layers:
                self._round_layer(self._layer)
            else:
                self._round_head()
            self._layer += 1
        return self._done[name]

    @torch.no_grad()
    def _round_layer(self, layer: int) -> None:
        config, prefix = self._weights.config, f"model.layers.{layer}."
        self._said(f"layer {layer + 1} of {config.n_layers}")
        block = block_of(config, layer, self._weights.read)
        linears = dict(named_products(block))
        grams: dict[str, Tensor] = {}
        hooks = [linear.register_forward_pre_hook(_adds_up(grams, _INPUTS[name])) for name, linear in linears.items()]
        for x in self._hidden:
            run(block, config, layer, x)
        for hook in hooks:
            hook.remove()
        for inputs, gram in grams.items():
            alike = {f"{prefix}{name}.weight": _weight(linears[name]) for name in linears if _INPUTS[name][0] == inputs}
            self._round({name: weight for name, weight in alike.items() if name in self._kinds}, gram)
            for name, weight in alike.items():
                if name in self._done:
                    weight.copy_(self._done[name][0].dense())
        for i, x in enumerate(self._hidden):
            self._hidden[i] = run(block, config, layer, x)

    @torch.no_grad()
    def _round_head(self) -> None:
        self._said("head")
        gram = sum(_gram(normed(self._weights, x)) for x in self._hidden)
        assert isinstance(gram, Tensor)
        self._round({HEAD: self._weights.read(HEAD).float()}, gram)

    def _round(self, matrices: Mapping[str, Tensor], gram: Tensor) -> None:
        """Round matrices with the same inputs; those of one kind together, since each row is a problem of its own."""
        for kind in dict.fromkeys(self._kinds[name] for name in matrices):
            alike = {name: weight for name, weight in matrices.items() if self._kinds[name] == kind}
            rounded, start = calibrated(torch.cat(list(alike.values())), gram, kind), 0
            for name, weight in alike.items():
                matrix = rounded.rows(start, start + len(weight))
                self._done[name] = matrix, output_error(weight, matrix.dense(), gram)
                start += len(weight)


# Where each linear's inputs are gathered, and whether it is the one that does it: several have the same
_INPUTS = {
    "self_attn.q_proj": ("attention", True),
    "self_attn.k_proj": ("attention", False),
    "self_attn.v_proj": ("attention", False),
    "self_attn.o_proj": ("values", True),
    "mlp.gate_proj": ("feed-forward", True),
    "mlp.up_proj": ("feed-forward", False),
    "mlp.down_proj": ("products", True),
}


def _adds_up(grams: dict[str, Tensor], where: tuple[str, bool]) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if where[1]:
            gram = _gram(inputs[0])
            grams[where[0]] = grams[where[0]] + gram if where[0] in grams else gram

    return hook


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _gram(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows


def calibration_rows(
    tokenizer: Tokenizer, file: str | Path | None, tokens: int = TOKENS, length: int = LENGTH
) -> Tensor:
    """Ids [B, length] of a text, from all over it: about `tokens` of them, or all where it has fewer.

    file: a .txt file, or rows with texts or conversations; None for Python's reference manual.
    Raises `DataError` where there is not one row.
    """
    ids: list[int] = []
    for part in _encoded(tokenizer, file):
        ids += part
    if len(ids) < length:
        raise DataError(
            f"{file}: {len(ids):,} tokens to calibrate by, and a row has {length}; give a longer text (about "
            f"{TOKENS:,} tokens are used)"
        )
    n_rows = len(ids) // length
    wanted = min(n_rows, max(1, tokens // length))
    starts = [i * n_rows // wanted * length for i in range(wanted)]
    return torch.tensor([ids[start : start + length] for start in starts])


def _encoded(tokenizer: Tokenizer, file: str | Path | None) -> Iterator[list[int]]:
    """Ids of each text, after the token that begins one."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    begin = [] if first is None else [first]
    for text in _texts(file):
        if isinstance(text, str):
            yield begin + tokenizer.encode(text)
        else:
            yield encode_chat(tokenizer, text.messages, text.tools, add_generation_prompt=False)


def _texts(file: str | Path | None) -> Iterator[str | Conversation]:
    if file is None:
        from pydoc_data.topics import topics

        yield from topics.values()
    elif Path(file).suffix == ".txt":
        yield read_text(Path(file))
    else:
        for record in (record for found in source_files(file) for record in read_records(found)):
            text = parse_row(record).get("text")
            yield text if isinstance(text, str) else parse_record(record)
