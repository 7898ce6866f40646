"""The inference engine over a policy that is being trained: it answers with the weights as they are now.

A low-rank adapter acts beside its base, which never changes: the engine is handed the adapter's tensors, a few
megabytes. Where every weight is trained, all are refitted in place. Either way the numbers are the trainer's, rounded
to the type that it computes in, so log-probabilities of sampler and trainer differ by rounding alone, which is measured
in every step (policy.py).

Every data-parallel process has an engine of its own and answers its share of the prompts; the weights are gathered on
process 0 and broadcast. Price: the engine's copy of the weights and its cache on each of them (`memory`).
`ray_sampler.py` has the engine in another process.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from arriero.checkpoint.load import load_model
from arriero.errors import TrainingError
from arriero.infer.blocks import blocks_for
from arriero.infer.engine import Engine as Inference
from arriero.infer.request import Completion, Request
from arriero.infer.step import BLOCK
from arriero.model.llama import Llama
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.base import Tokenizer
from arriero.train.recipe import DTYPES
from arriero.train.tuned import Tuned

STEP_TOKENS = 512  # of prompts in a step: nobody waits for a first token
POLICY = "policy"  # the adapter's name in the engine


@dataclass(frozen=True)
class Weights:
    """What of a policy is trained, and a checksum of it."""

    tensors: Mapping[str, Tensor]
    checksum: int


class PolicyEngine:
    """An engine that takes up weights, and answers with them. lora: of an adapter; None: all weights are taken up."""

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, lora: LoraConfig | None, *, longest: int, at_once: int
    ) -> None:
        self._lora = lora
        self.engine = Inference(
            model,
            tokenizer,
            cache_tokens=at_once * blocks_for(longest) * BLOCK,
            max_running=at_once,
            step_tokens=max(STEP_TOKENS, at_once),
            context=longest,
        )

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Answer with these from now on."""
        if self._lora is not None:
            self.engine.load_adapter(POLICY, (self._lora, tensors))
            return
        self.engine.pause()
        for name, tensor in tensors.items():
            self.engine.refit(name, tensor)
        self.engine.resume()

    def answer(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """All answers, in the order of the requests, which name no adapter."""
        adapter = None if self._lora is None else POLICY
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call]
            return self.engine.generate([replace(request, adapter=adapter) for request in requests])


class Sampler:
    """Answers prompts with the weights of `tuned` that were last taken up."""

    def __init__(self, tuned: Tuned, *, longest: int, at_once: int) -> None:
        """longest: tokens of a prompt and its answer. at_once: answers that are decoded at a time."""
        self.tuned = tuned
        self.weights = 0  # the checksum of those that it answers with
        self._open(longest, at_once)

    def _open(self, longest: int, at_once: int) -> None:
        tuned, config = self.tuned, self.tuned.base.config
        engine, mesh = tuned.engine, tuned.engine.mesh
        with ExitStack() as stack:
            if self._lora and not mesh.distributed:
                stack.enter_context(engine.using_adapter(None))  # the base, as the trainer holds it
                model = engine.model
            else:
                held = None if config.quantize == "none" else config.quantize
                model = load_model(config.model, dtype=DTYPES[config.loop.precision], quantization=held)
                model.to(mesh.device).model.compute_like(engine.model.model)
            self._policy = PolicyEngine(
                model, tuned.base.tokenizer, tuned.base.lora if self._lora else None, longest=longest, at_once=at_once
            )

    @property
    def _lora(self) -> bool:
        return self.tuned.base.config.method == "lora"

    def current(self) -> Weights:
        """The weights as they are now, good until the next step. Every process has to call it."""
        engine = self.tuned.engine
        tensors = self._everywhere(dict(engine.trained_tensors() if self._lora else engine.dense_tensors()))
        checksum = 0
        for name in sorted(tensors):
            view = tensors[name].detach().contiguous().view(torch.uint8).numpy()
            checksum = zlib.crc32(view, checksum)  # type: ignore[arg-type]  # a buffer of bytes
        return Weights(tensors, checksum)

    def take(self, weights: Weights) -> None:
        """Answer with these from now on."""
        if weights.checksum != self.weights:
            self._put(weights.tensors)
            self.weights = weights.checksum

    def answer(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """All answers, in the order of the requests, which name no adapter."""
        found = self._ask(requests)
        for answers in found:
            for answer in answers:
                if answer.error is not None:
                    raise TrainingError(f"an answer could not be sampled: {answer.error}")
        return found

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the engine's copy of the weights, and of its cache, in this process."""
        return self._policy.engine.memory

    @property
    def summary(self) -> str:
        """Who answers, and what it takes."""
        held = self.memory
        return f"{held['weights'] / 1e6:,.0f} MB of weights and {held['cache'] / 1e6:,.0f} MB of cache"

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        self._policy.take(tensors)

    def _ask(self, requests: Sequence[Request]) -> list[list[Completion]]:
        return self._policy.answer(requests)

    def _everywhere(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What process 0 has gathered, on all processes."""
        mesh = self.tuned.engine.mesh
        if not mesh.distributed:
            return tensors
        names = [[(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]]
        dist.broadcast_object_list(names, 0, device=mesh.device)
        found = {}
        for name, shape, dtype in names[0]:
            here = (
                tensors[name].to(mesh.device) if mesh.rank == 0 else torch.empty(shape, dtype=dtype, device=mesh.device)
            )
            dist.broadcast(here, 0)
            found[name] = here.cpu()
        return found
