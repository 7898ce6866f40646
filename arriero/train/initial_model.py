"""The model that pretraining begins from: a known shape with random weights, or a pretrained model."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arriero.checkpoint.beside import NOTHING, Beside, read_beside
from arriero.checkpoint.load import has_tokenizer, load_tokenizer_at, open_model
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.source import resolve
from arriero.distributed.materialise import Values
from arriero.errors import ConfigError, did_you_mean
from arriero.model.build import empty_model
from arriero.model.catalogue import LADDER, SHAPES, named_shape
from arriero.model.config import LlamaConfig
from arriero.model.initial import initial_weight
from arriero.model.llama import Llama
from arriero.tokenizer import Tokenizer
from arriero.train.config import PretrainConfig
from arriero.train.hardware import refuse_what_cannot_fit


@dataclass(frozen=True)
class InitialModel:
    """A model on the meta device, where its values come from, and the files beside it that its copies keep."""

    model: Llama
    values: Values
    beside: Beside


def initial_model(config: PretrainConfig, tokenizer: Tokenizer, seq_len: int) -> InitialModel:
    """A new model of the shape that `config.model` names, or the model of that name.

    tokenizer: that of the shards. seq_len: tokens of the longest row of the run.
    """
    shape = named_shape(config.model)
    return _pretrained(config, tokenizer, seq_len) if shape is None else _random(config, shape, tokenizer, seq_len)


def _random(config: PretrainConfig, shape: LlamaConfig, tokenizer: Tokenizer, seq_len: int) -> InitialModel:
    """A shape of the ladder gets the tokenizer's vocabulary and the context of its longest row (past it a model is
    lost); a published one keeps its own, if its vocabulary holds the tokenizer's."""
    if config.model in LADDER:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size, max_context=seq_len)
    _check_vocabulary(config.model, shape.vocab_size, tokenizer)
    theta = config.rope_theta or shape.rope_theta
    shape = dataclasses.replace(shape, max_context=max(seq_len, shape.max_context), rope_theta=theta)
    refuse_what_cannot_fit(config.model, shape.n_params)
    drawn = functools.partial(initial_weight, seed=config.loop.seed, depth_scaled=shape.n_layers)
    return InitialModel(empty_model(shape), drawn, NOTHING)


def _pretrained(config: PretrainConfig, tokenizer: Tokenizer, seq_len: int) -> InitialModel:
    """A model's own tokenizer must give the ids of the shards the same meaning; one that comes without a tokenizer is
    taken on trust."""
    near = did_you_mean(config.model, SHAPES)
    if near and "/" not in config.model and not Path(config.model).exists():
        raise ConfigError(f"no shape or model {config.model!r}{near} (arriero ls models lists the shapes)")
    path = resolve(config.model)
    own = load_tokenizer_at(path) if has_tokenizer(path) else None
    if own is not None and not own.holds(tokenizer):
        raise ConfigError(
            f"the shards' ids are not those of {config.model}: its own tokenizer reads them as other text; "
            "shard the data with it (arriero shard --tokenizer), or begin with a shape instead of a model"
        )
    model, weights = open_model(path, torch.float32)
    if own is not None:
        check_rows(path, model.config.vocab_size, own)
    _check_vocabulary(config.model, model.config.vocab_size, tokenizer)
    changes: dict[str, Any] = {"max_context": max(seq_len, model.config.max_context)}
    if config.rope_theta:
        changes["rope_theta"] = config.rope_theta
    model.config = model.model.config = dataclasses.replace(model.config, **changes)
    return InitialModel(model, weights.part, read_beside(path).for_training(tokenizer))


def _check_vocabulary(name: str, size: int, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"{name} has {size:,} tokens, the shards were made with a tokenizer of {tokenizer.vocab_size:,}; "
            "shard the data with the model's own tokenizer (arriero shard --tokenizer), or choose another shape"
        )
