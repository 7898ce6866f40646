"""Answers to many prompts, or in one conversation: the engine with one kind of request, for those who want no more.

An adapter that acts on the model is folded, so that a step reads one matrix instead of three, and computes with the
weights that `arriero merge` would save.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace

from arriero.errors import ConfigError
from arriero.infer.blocks import blocks_for
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Completion, Event, Request
from arriero.infer.step import BLOCK
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer

STEP_TOKENS = 512  # of prompts in a step, where nobody waits for the next token of another


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008  frozen
    max_new_tokens: int = 256,
    *,
    stop_ids: Collection[int] | None = None,
    batch: int = 16,
    on_done: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Answer every prompt (token ids), in the order given.

    stop_ids: ids that end an answer; None takes the tokenizer's. batch: prompts that are answered at a time. on_done:
    called once for each finished prompt. Prompt i draws with seed + i: neither the batch size nor the other prompts
    change its answer, up to rounding.
    Raises `ConfigError` for an empty prompt or one that leaves no room in the model's context.
    """
    requests = []
    for i, prompt in enumerate(prompts):
        seed = None if sampling.seed is None else (sampling.seed + i) % 2**64
        try:
            request = Request(prompt, max_new_tokens, replace(sampling, seed=seed), stop_ids=stop_ids)
            request.check_room(model.config.max_context)
        except ConfigError as error:
            raise ConfigError(f"prompt {i}: {error}") from error
        requests.append(request)
    if not requests:
        return []
    context = model.config.max_context
    longest = sorted((min(len(prompt) + max_new_tokens, context) for prompt in prompts), reverse=True)[:batch]
    engine = Engine(
        model,
        tokenizer,
        cache_tokens=sum(map(blocks_for, longest)) * BLOCK,
        max_running=batch,
        step_tokens=max(STEP_TOKENS, batch),
    )
    return [answers[0] for answers in engine.generate(requests, on_done=on_done)]


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008  frozen
    max_new_tokens: int = 256,
    *,
    stop_ids: Collection[int] | None = None,
) -> Iterator[str]:
    """Yield the text that follows a prompt (token ids) as it grows, in whole UTF-8 characters."""
    session = Session(model, tokenizer, min(len(prompt) + max_new_tokens, model.config.max_context))
    for event in session.answer(prompt, sampling, max_new_tokens, stop_ids=stop_ids):
        if event.text:
            yield event.text


class Session:
    """One conversation: what a prompt shares with the prompts and answers before it is not computed again."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, context: int = 0) -> None:
        """context: most tokens of prompt and answer; 0 means the model's own context, at most 8192."""
        self.context = min(context or 8192, model.config.max_context)
        self._engine = Engine(
            model,
            tokenizer,
            cache_tokens=self.context,
            max_running=1,
            step_tokens=STEP_TOKENS,
            context=self.context,
        )

    def answer(
        self,
        ids: Sequence[int],
        sampling: SamplingConfig,
        max_new_tokens: int,
        *,
        stop_ids: Collection[int] | None = None,
    ) -> Generator[Event, None, None]:
        """Yield what follows `ids`, token by token; may be left at any point.

        Raises `ConfigError` for a prompt that leaves no room in the context.
        """
        yield from self._engine.stream(Request(ids, max_new_tokens, sampling, stop_ids=stop_ids))
