"""The adapters of an engine: by name for those who ask, by content for the cache.

A step knows each load under a name of its own, so that requests under way keep what they began with when a name is
loaded anew. The digest is of settings and tensors: equal adapters share cached beginnings, others never do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arriero.checkpoint.adapter import linears_of, read_adapter
from arriero.errors import ConfigError
from arriero.infer.step import Step
from arriero.model.linear import Product
from arriero.model.llama import Llama
from arriero.model.lora_config import LoraConfig


@dataclass(eq=False)
class Adapter:
    """One load of an adapter; `users` are the requests under way."""

    step_name: str
    digest: bytes
    users: int = 0
    loaded: bool = True


class Adapters:
    """What is loaded on a step."""

    def __init__(self, model: Llama, step: Step) -> None:
        self._linears = linears_of(model)
        self._step = step
        self._loaded: dict[str, Adapter] = {}
        self._loads = 0

    @property
    def names(self) -> list[str]:
        """Of the loaded ones."""
        return list(self._loaded)

    def load(self, name: str, source: str | Path | tuple[LoraConfig, Mapping[str, Tensor]]) -> None:
        """See `Engine.load_adapter`."""
        if isinstance(source, tuple):
            config, tensors = source
            _check(name, config, tensors, self._linears)
        else:
            config, tensors = read_adapter(self._linears, source)
        adapter = Adapter(f"load-{self._loads}", _digest(config, tensors))
        self._step.add_adapter(adapter.step_name, config, tensors)
        self._loads += 1
        if name in self._loaded:
            self.unload(name)
        self._loaded[name] = adapter

    def unload(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        adapter = self._known(name)
        del self._loaded[name]
        adapter.loaded = False
        self._drop_unused(adapter)

    def use(self, name: str | None) -> Adapter | None:
        """The adapter of that name for one more request; raises `ConfigError` where there is none."""
        if name is None:
            return None
        adapter = self._known(name)
        adapter.users += 1
        return adapter

    def leave(self, adapter: Adapter | None) -> None:
        """A request is done with it."""
        if adapter is not None:
            adapter.users -= 1
            self._drop_unused(adapter)

    def _known(self, name: str) -> Adapter:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise ConfigError(f"the engine has no adapter {name!r}; loaded are: {known} (load_adapter loads one)")
        return self._loaded[name]

    def _drop_unused(self, adapter: Adapter) -> None:
        if not adapter.loaded and not adapter.users:
            self._step.remove_adapter(adapter.step_name)


def _digest(config: LoraConfig, tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of all that decides what an adapter does."""
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.digest()


def _check(name: str, config: LoraConfig, tensors: Mapping[str, Tensor], linears: Mapping[str, Product]) -> None:
    """Raises `ConfigError` unless the tensors are those that the settings ask for, on this model."""
    needed: dict[str, tuple[int, ...]] = {}
    for full, linear in linears.items():
        if config.matches(full):
            rank = config.rank_pattern.get(full, config.rank)
            needed[f"{full}.lora_A.weight"] = rank, linear.in_features
            needed[f"{full}.lora_B.weight"] = linear.out_features, rank
    given = {full: tuple(tensor.shape) for full, tensor in tensors.items()}
    for full in [*needed, *given]:
        if needed.get(full) != given.get(full):
            raise ConfigError(
                f"adapter {name!r}: {full} is {_shape(given.get(full))}, and its settings on this model need "
                f"{_shape(needed.get(full))}; give the tensors and settings of one adapter for this model"
            )
    if bad := [full for full, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ConfigError(f"adapter {name!r}: {bad[0]} holds values that are not finite; its training diverged")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else str(list(shape))
