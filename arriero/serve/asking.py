"""From what a client asks to requests of the engine, for all APIs: prompts, limits, grammars.

An `Ask` is what the APIs have in common. `prepared` checks it against the server's limits and the model's context, and
`answered` runs it. Rendering and encoding, which take time in proportion to the prompt, are on threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from arriero.errors import ConfigError
from arriero.infer.config import SamplingConfig
from arriero.infer.request import Request
from arriero.serve.config import ServeConfig
from arriero.serve.faults import ApiError
from arriero.serve.models import Use

if TYPE_CHECKING:
    from arriero.serve.driver import Ticket

MAX_N = 32
MAX_TOP_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 500
MAX_BIASES = 1024
MAX_PROMPTS = 256
MAX_SCHEMA = 1 << 16
Constraint = tuple[Literal["json_schema", "regex", "grammar", "choices"], str | list[str]]
BUSY = 1  # seconds after which a client should ask again


@dataclass(frozen=True)
class Ask:
    """Prompts and how each is to be answered; None is for what the client left out.

    prompts: token ids. sampling: the settings that the client gave, by their names in `SamplingConfig`. constraint:
    kind and text of a grammar. stop_ids: token ids that end an answer beside the tokenizer's.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    stop: Sequence[str] = ()
    logprobs: int | None = None
    echo: bool = False
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    salt: str = ""
    stop_ids: Sequence[int] = ()


async def prepared(use: Use, ask: Ask, config: ServeConfig) -> list[Request]:
    """The engine's requests. Raises `ApiError` for what is beyond a limit."""
    _check(ask, config)
    grammar = None
    if ask.constraint is not None:
        kind, text = ask.constraint
        size = sum(map(len, [text] if isinstance(text, str) else text))
        _most("response_format", "the schema or grammar has {} characters", size, MAX_SCHEMA)
        grammar = await use.loaded.grammar(kind, text)
    sampling = SamplingConfig(**{"temperature": 1.0, **use.loaded.own, **ask.sampling})
    requests = []
    for i, prompt in enumerate(ask.prompts):
        room = _room(use, prompt, ask, config)
        seed = None if sampling.seed is None else (sampling.seed + i * ask.n) % 2**63
        requests.append(
            Request(
                prompt,
                room,
                SamplingConfig(**{**vars(sampling), "seed": seed}),
                n=ask.n,
                stop_ids={*use.tokenizer.stop_ids, *ask.stop_ids},
                stop=tuple(ask.stop),
                echo=ask.echo,
                logprobs=ask.logprobs,
                prompt_logprobs=ask.prompt_logprobs,
                grammar=grammar,
                adapter=use.adapter,
                salt=ask.salt,
            )
        )
    return requests


@contextlib.asynccontextmanager
async def answered(use: Use, requests: Sequence[Request], config: ServeConfig) -> AsyncIterator[Ticket]:
    """The requests under way. Raises `ApiError` where too many wait already."""
    driver = use.loaded.driver
    most = config.max_running + config.max_waiting
    if driver.load >= most:
        raise ApiError(
            429, f"{driver.load:,} answers are under way or wait, and {most:,} may; ask again", retry_after=BUSY
        )
    async with driver.ask(requests) as ticket:
        yield ticket


def _check(ask: Ask, config: ServeConfig) -> None:
    _most("n", "n is {}", ask.n, min(MAX_N, config.max_running))
    _most("prompt", "there are {} prompts", len(ask.prompts), MAX_PROMPTS)
    _most("max_tokens", "max_tokens is {}", ask.max_tokens or 0, config.max_tokens)
    _most("stop", "there are {} stop strings", len(ask.stop), MAX_STOPS)
    _most("stop", "a stop string has {} characters", max(map(len, ask.stop), default=0), MAX_STOP_LENGTH)
    _most("logit_bias", "logit_bias has {} entries", len(ask.sampling.get("logit_bias") or ()), MAX_BIASES)
    for name in ("logprobs", "prompt_logprobs"):
        _most(name, name + " asks for the {} most probable tokens", getattr(ask, name) or 0, MAX_TOP_LOGPROBS)


def _most(param: str, text: str, value: int, most: int) -> None:
    if value > most:
        raise ApiError(400, f"{text.format(f'{value:,}')}; at most {most:,} here", param=param)


def _room(use: Use, prompt: Sequence[int], ask: Ask, config: ServeConfig) -> int:
    """Tokens that an answer may have. Raises `ApiError` for a prompt that leaves none."""
    if not prompt:
        raise ApiError(
            400, "the prompt is empty, and this model's tokenizer has no token to begin with", param="prompt"
        )
    context = min(use.context, use.loaded.engine.cache_tokens)
    room = context - len(prompt)
    wanted = config.max_tokens if ask.max_tokens is None else ask.max_tokens
    if room < min(wanted, 1) or room < 0:
        raise ApiError(
            400,
            f"the prompt has {len(prompt):,} tokens, and the context {context:,} for prompt and answer; shorten it",
            param="prompt",
            code="context_length_exceeded",
        )
    return min(room, wanted)


def given(**settings: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def seed_of(seed: int | None) -> int | None:
    """A client's seed, which may be negative, as the engine's."""
    return None if seed is None else seed % 2**63


def biases(given: dict[str, float] | None) -> dict[int, float] | None:
    """OpenAI's logit_bias, whose ids are texts."""
    if given is None:
        return None
    try:
        return {int(token): float(bias) for token, bias in given.items()}
    except ValueError as error:
        raise ConfigError(f"logit_bias: {error}; its members are token ids") from None
