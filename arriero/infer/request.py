"""What the engine is asked, and what it answers. No torch here.

Log-probabilities are of two distributions. `raw` is the softmax of the model's logits over its whole vocabulary, what a
trainer computes; `sampled` is what the token was drawn from, after bias, penalties, temperature and filters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from arriero.errors import ConfigError, check
from arriero.infer.config import SamplingConfig
from arriero.infer.structured import Grammar

Distribution = Literal["raw", "sampled"]

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""stop: a stop id or stop string, or the end of what a grammar allows. length: max_new_tokens, or the end of the
context. error: the answer's grammar could not be followed further."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued. Checked on construction; against the model on `Engine.submit`."""

    prompt: Sequence[int]
    """Token ids; at least one."""
    max_new_tokens: int = 256
    """Longest answer in tokens; fewer where the context ends. 0 answers nothing: for the prompt's log-probabilities."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are chosen. Without a seed each answer draws one."""
    n: int = 1
    """Answers to the same prompt, which is computed once; answer i draws with seed + i."""
    stop_ids: Collection[int] | None = None
    """Ids that end an answer and are no part of it; None: the tokenizer's."""
    stop: Sequence[str] = ()
    """Texts that end an answer, and are cut off its text with whatever follows. Ids end with the token that completed
    the text."""
    text: bool = True
    """Whether events have text; without, ids alone."""
    echo: bool = False
    """Whether the text begins with the prompt's."""
    logprobs: int | None = None
    """Give the log-probabilities of each token of the answer, and of this many most probable ones; None gives none."""
    top_of: Distribution = "raw"
    """Of which distribution the most probable ones are."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, raw, but for the first, which nothing precedes."""
    prompt_logprobs_from: int = 1
    """First position of the prompt whose log-probability is given; what lies before may come from the cache."""
    grammar: Grammar | None = None
    """What each answer's text has to satisfy, of a `structured.Compiler` for the engine's tokenizer."""
    adapter: str | None = None
    """Name of a loaded adapter that acts; None: none of them."""
    salt: str = ""
    """Only requests of equal salt share cached beginnings: one for each tenant, and none can time another's prompts."""

    def __post_init__(self) -> None:
        check(len(self.prompt) > 0, "the prompt is empty; give at least one token (a beginning-of-text token will do)")
        least = 1 if self.prompt_logprobs is None else 0
        check(
            self.max_new_tokens >= least,
            f"max_new_tokens is {self.max_new_tokens}; it must be at least 1, or 0 with prompt_logprobs",
        )
        check(self.n >= 1, f"n is {self.n}; it must be at least 1")
        check(self.n == 1 or self.max_new_tokens > 0, f"n is {self.n} with max_new_tokens 0: nothing would differ")
        check(self.text or not (self.stop or self.echo), "stop strings and echo are of the text, and text is off")
        check("" not in self.stop, "a stop string is empty, so every answer would be; leave it out")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(
                value is None or value >= 0, f"{name} is {value}; it must be at least 0 (0: the chosen token's alone)"
            )
        check(
            1 <= self.prompt_logprobs_from <= len(self.prompt),
            f"prompt_logprobs_from is {self.prompt_logprobs_from}; it is a position of the prompt, from 1 to its "
            f"length of {len(self.prompt):,}",
        )

    def check_room(self, context: int) -> int:
        """Tokens that an answer may have in a context of so many; raises `ConfigError` where there is no room."""
        n = len(self.prompt)
        if n + (self.max_new_tokens > 0) > context:
            raise ConfigError(
                f"the prompt has {n:,} tokens, which leaves no room for an answer in a context of {context:,}; "
                "shorten it"
            )
        return min(self.max_new_tokens, context - n)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """ln p of a token, raw and (but for a prompt's) as sampled; the most probable ids with theirs, of `top_of`."""

    raw: float
    sampled: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    top_of: Distribution = "raw"


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to one answer in one step.

    token: the id that was chosen; None where none was. text: characters that are complete now, and no part of a stop
    string to come. logprob: where asked for. prompt_logprobs: those of the whole prompt, with the first event of each
    answer, and so is `cached`: the tokens of the prompt that need not be computed. finish: with the last event, and
    `stopped_by` the id or text that ended the answer, or `error` what went wrong.
    """

    request: int
    index: int
    token: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    cached: int = 0
    finish: FinishReason | None = None
    stopped_by: int | str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer: ids without the stop id, text without the stop string, and why it ended."""

    ids: list[int]
    text: str
    finish: FinishReason
    stopped_by: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    """Of each of `ids`, and of the stop id where that ended the answer."""
    prompt_logprobs: list[TokenLogprob] | None = None
    cached: int = 0
    """Tokens of the prompt that need not be computed."""
    error: str | None = None
    """What went wrong, where the answer ended with an error."""

    @property
    def stopped(self) -> bool:
        """Whether the answer ended by itself."""
        return self.finish == "stop"


def joined(events: Sequence[Event]) -> Completion:
    """The answer that the events of one request and index tell of."""
    last = events[-1]
    assert last.finish is not None, "the answer goes on"
    tokens = [event for event in events if event.token is not None]
    ids = [event.token for event in tokens if event.token is not None]
    if ids and last.stopped_by == ids[-1] and last.token is not None:
        ids.pop()
    logprobs = [event.logprob for event in tokens if event.logprob is not None]
    prompt = events[0].prompt_logprobs
    return Completion(
        ids, "".join(event.text for event in events), last.finish, last.stopped_by,
        logprobs if logprobs else None, None if prompt is None else list(prompt), events[0].cached, last.error,
    )  # fmt: skip
