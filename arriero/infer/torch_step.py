"""The step in torch: the model's own forward over a paged cache (model/paged.py), for every device, type and relative.

Adapters are put on a copy of the model that shares its tensors, so what the model is used for otherwise goes on as it
was. Adapters that the model came with are folded: the engine serves it as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from arriero.errors import ConfigError
from arriero.infer.step import BLOCK, StepInput
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state, merged_copy, remove_lora, sharing_copy, use_adapter
from arriero.model.lora_config import LoraConfig
from arriero.model.paged import PagedCache, PagedTokens


def block_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Memory of one block: keys and values of `BLOCK` tokens in all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * BLOCK * dtype.itemsize


def computed_in(model: Llama) -> torch.dtype:
    """The type that the model computes in, and that a cache of it has."""
    return model.model.compute_dtype or model.model.embed_tokens.weight.dtype


class TorchStep:
    """A model with a paged cache; see `Step`."""

    def __init__(self, model: Llama, n_blocks: int) -> None:
        self._model, self._carries_adapters = merged_copy(model), False
        self._cache = PagedCache(model.config, n_blocks, BLOCK, computed_in(model), model.device)
        self.n_blocks, self.vocab_size = n_blocks, model.head.out_features

    @property
    def share(self) -> None:
        """torch's threads are not lent."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the model's own tensors, which the step shares, and of the cache."""
        weights = {id(t): t.nbytes for t in (*self._model.parameters(), *self._model.buffers())}
        return {"weights": sum(weights.values()), "cache": self._cache.k.nbytes + self._cache.v.nbytes}

    @torch.inference_mode()
    def __call__(self, batch: StepInput) -> Tensor:
        """Logits fp32 [m, V] on the CPU."""
        tokens, positions, sequences, tables = (
            torch.from_numpy(x).long() for x in (batch.tokens, batch.positions, batch.sequences, batch.tables)
        )
        if self._carries_adapters:
            one = len(set(batch.adapters)) == 1
            use_adapter(self._model, batch.adapters[0] if one else [batch.adapters[i] for i in batch.sequences])
        layout = PagedTokens(self._cache, positions, sequences, tables)
        hidden = self._model.model(tokens[:, None].to(self._model.device), layout)[:, 0]
        wanted = torch.from_numpy(batch.outputs).long().to(hidden.device)
        return self._model.head(hidden[wanted]).float().cpu()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy block `source` to block `target` for each (source, target), in order."""
        for source, target in pairs:
            self._cache.copy_block(source, target)

    def add_adapter(self, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Carry one more adapter, whose tensors `lora_state` names."""
        if not self._carries_adapters:
            self._model, self._carries_adapters = sharing_copy(self._model).eval(), True
        add_lora(self._model, config, name=name)
        with torch.no_grad():
            for full, parameter in lora_state(self._model, name).items():
                parameter.copy_(tensors[full])

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter."""
        remove_lora(self._model, name)

    @torch.no_grad()
    def refit(self, name: str, tensor: Tensor) -> None:
        """Take new values for a weight, in place: of the model that the engine was made of, too."""
        plain = {full.replace(".base.", "."): p for full, p in self._model.named_parameters() if ".lora_" not in full}
        if (parameter := plain.get(name)) is None:
            raise ConfigError(f"refit: the model has no weight {name!r}; names are those of its state_dict()")
        if parameter.shape != tensor.shape:
            raise ConfigError(
                f"refit: {name} has shape {list(tensor.shape)}, and the model needs {list(parameter.shape)}"
            )
        parameter.copy_(tensor)
