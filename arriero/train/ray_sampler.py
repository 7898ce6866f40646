"""The policy's inference engine in a process of its own, on this machine or another, through Ray: `--rollout ray`.

The worker opens the model by its name, so that has to lead to the same files there, and is sent what is trained as
safetensors before each batch that it answers. Where `rollout_lag` is 0 its numbers are those of an engine in this
process, bit for bit; above, it answers the prompts of steps to come while this process learns (rollouts.py).

Price: the base a second time, in the worker; an adapter's few megabytes, or all weights, sent at each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from arriero.checkpoint.load import load_model, load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.errors import TrainingError
from arriero.infer.request import Completion, Request
from arriero.system.cluster import connected
from arriero.train.config import TuneConfig
from arriero.train.recipe import DTYPES
from arriero.train.sampler import PolicyEngine, Sampler, Weights


class Worker:
    """What lives in the other process."""

    def __init__(
        self, config: TuneConfig, lora: Any, residual: torch.dtype | None, longest: int, at_once: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        held = None if config.quantize == "none" else config.quantize
        computed = DTYPES[config.loop.precision]
        model = load_model(config.model, dtype=computed, quantization=held).set_compute_dtype(computed, residual)
        tokenizer = load_tokenizer_at(
            resolve(config.model), adapter=config.adapter or None, chat_template=config.chat_template
        )
        self._policy = PolicyEngine(model, tokenizer, lora, longest=longest, at_once=at_once)

    def memory(self) -> dict[str, int]:
        """Bytes of the engine's copy of the weights, and of its cache."""
        return self._policy.engine.memory

    def take(self, weights: bytes) -> None:
        """Answer with these from now on."""
        self._policy.take(load(weights))

    def answer(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """All answers, in the order of the requests."""
        return self._policy.answer(requests)


class RaySampler(Sampler):
    """A `Sampler` whose engine is a Ray actor's."""

    def _open(self, longest: int, at_once: int) -> None:
        base, decoder = self.tuned.base, self.tuned.engine.model.model
        address = base.config.rollout.rollout.partition(":")[2] or "local"  # type: ignore[attr-defined]
        self._ray = connected(address, 1)
        lora = base.lora if self._lora else None
        arguments = (base.config, lora, decoder.residual_dtype, longest, at_once, torch.get_num_threads())
        cpus = 0 if address == "local" else 1  # one that is here waits for nothing
        self._worker = self._ray.remote(num_cpus=cpus, max_restarts=0)(Worker).remote(*arguments)
        self._memory: Mapping[str, int] = self._get(self._worker.memory.remote())

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the worker's copy of the weights, and of its cache."""
        return self._memory

    def current(self) -> Weights:
        """A copy of the weights: they are sent when the worker is free, and learn meanwhile."""
        now = super().current()
        return Weights({name: tensor.detach().cpu().clone() for name, tensor in now.tensors.items()}, now.checksum)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        self._get(self._worker.take.remote(save({name: tensor.contiguous() for name, tensor in tensors.items()})))

    def _ask(self, requests: Sequence[Request]) -> list[list[Completion]]:
        found: list[list[Completion]] = self._get(self._worker.answer.remote(list(requests)))
        return found

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayActorError as error:
            why = str(error).partition("\n")[0]
            raise TrainingError(
                f"the rollout worker has died ({why}); resume the run: what it had answered is in its journal"
            ) from error
