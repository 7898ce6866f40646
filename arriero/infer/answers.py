"""Requests under way, and what is told of them: an answer's tokens become texts, log-probabilities and events here.

Nothing is computed here. The engine says which token was chosen (`Answers.said`) or that an answer ends (`finish`), and
takes the events (`take`); whoever holds something for an answer is told by `on_end`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from arriero.errors import ConfigError, UserError, check
from arriero.infer.adapters import Adapter
from arriero.infer.answer_text import AnswerText
from arriero.infer.request import Event, FinishReason, Request, TokenLogprob
from arriero.infer.sample import token_words
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.scheduler import Sequence
from arriero.infer.speculate import Drafted, Lookup
from arriero.infer.structured import Constraint
from arriero.tokenizer.base import Tokenizer


@dataclass(eq=False)
class Answer:
    """One of the answers to a request."""

    asked: Asked
    index: int
    sequence: Sequence
    row: SamplerRow  # what the sampler knows of it
    text: AnswerText | None
    constraint: Constraint | None = None
    proposals: Lookup | Drafted | None = None
    told: bool = False  # whether an event of it has been made

    @property
    def n_new(self) -> int:
        return len(self.sequence.ids) - self.sequence.n_prompt

    @property
    def rest(self) -> str:
        """The characters that were held back, at its end."""
        return self.text.flush() if self.text else ""


@dataclass(eq=False)
class Asked:
    """A request under way."""

    id: int
    request: Request
    seed: int
    stop_ids: frozenset[int]
    room: int  # tokens that an answer may have
    adapter: Adapter | None
    answers: list[Answer] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def sequences(self) -> list[Sequence]:
        """Of its answers."""
        return [answer.sequence for answer in self.answers]


class Answers:
    """All requests under way, and the events that nobody has been told yet."""

    def __init__(self, tokenizer: Tokenizer | None, on_end: Callable[[Answer], None]) -> None:
        """on_end: called with each answer that has ended, once it is no longer among its request's answers."""
        self.tokenizer, self.words = tokenizer, token_words(tokenizer) if tokenizer else None
        self.asked: dict[int, Asked] = {}
        self._untold: list[Event] = []
        self._next_id = 0
        self._on_end = on_end

    def __bool__(self) -> bool:
        """Whether anything is under way or untold."""
        return bool(self._untold or self.asked)

    def add(
        self,
        request: Request,
        room: int,
        adapter: Adapter | None,
        root: bytes,
        proposals: Callable[[], Lookup | Drafted | None],
    ) -> Asked:
        """A request and its answers. room: tokens that each may have. root: as in `Sequence`.

        proposals: makes what proposes tokens for one answer.
        """
        tokenizer, stops = self.tokenizer, request.stop_ids
        if stops is None:
            stops = tokenizer.stop_ids if tokenizer else ()
        seed = request.sampling.seed
        seed = secrets.randbits(62) if seed is None else seed
        asked = Asked(self._next_id, request, seed, frozenset(stops), room, adapter)
        self._next_id += 1
        for index in range(request.n):
            sequence = Sequence((asked.id, index), list(request.prompt), root, adapter.step_name if adapter else None)
            sequence.generates = room > 0
            text = AnswerText(tokenizer, request.stop) if tokenizer and request.text else None
            row = SamplerRow(
                request.sampling, request.prompt, seed=seed + index, words=self.words,
                logprobs=request.logprobs is not None, n_top=request.logprobs or 0, top_of=request.top_of,
            )  # fmt: skip
            constraint = request.grammar.begin() if request.grammar else None
            asked.answers.append(answer := Answer(asked, index, sequence, row, text, constraint, proposals()))
            sequence.owner = answer
        first, *others = asked.sequences
        first.followers = others
        if request.prompt_logprobs is not None:
            first.scored_from = request.prompt_logprobs_from
        self.asked[asked.id] = asked
        return asked

    def check(self, request: Request, vocab_size: int, context: int, cache_tokens: int) -> int:
        """Raises `ConfigError` for a request that cannot be answered; returns the tokens that an answer may have."""
        prompt = request.prompt
        for token in request.sampling.logit_bias:
            check(token < vocab_size, f"logit_bias names the id {token}, and the model's are 0 to {vocab_size - 1:,}")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < vocab_size)
            raise ConfigError(f"the prompt has the id {wrong}, and the model's are 0 to {vocab_size - 1:,}")
        room = request.check_room(context)
        if (most := len(prompt) + max(room - 1, 0)) > cache_tokens:
            raise ConfigError(
                f"the prompt of {len(prompt):,} tokens and an answer of {room:,} need {most:,} tokens of cache, and "
                f"there are {cache_tokens:,}; give the engine more cache_bytes, or lower max_new_tokens"
            )
        check(not request.stop or self.tokenizer is not None, "stop strings are given, and the engine has no tokenizer")
        return room

    def take(self) -> list[Event]:
        """The events so far."""
        events, self._untold = self._untold, []
        return events

    def keep(self, events: list[Event]) -> None:
        """Events that were taken, for whoever takes the next ones."""
        self._untold = events + self._untold

    def forget(self, number: int) -> None:
        """Tell nothing more of a request."""
        self._untold = [event for event in self._untold if event.request != number]

    def said(self, answer: Answer, token: int, logprob: TokenLogprob | None) -> bool:
        """A token was chosen; returns whether it ended the answer."""
        answer.sequence.ids.append(token)
        answer.row.push(token)
        if answer.proposals is not None:
            answer.proposals.push(token)
        text, constraint = answer.text, answer.constraint
        try:
            ended = constraint is not None and constraint.accept(token)
        except UserError as error:
            piece = text.push(token) + text.flush() if text else ""
            return self.finish(answer, "error", token, piece, logprob, error=str(error))
        if token in answer.asked.stop_ids:
            return self.finish(answer, "stop", token, answer.rest, logprob, token)
        piece = text.push(token) if text else ""
        if text and text.stopped_by is not None:
            return self.finish(answer, "stop", token, piece, logprob, text.stopped_by)
        if ended or answer.n_new >= answer.asked.room:
            return self.finish(answer, "stop" if ended else "length", token, piece + answer.rest, logprob)
        self._tell(answer, token, piece, logprob)
        return False

    def finish(
        self,
        answer: Answer,
        finish: FinishReason,
        token: int | None = None,
        text: str = "",
        logprob: TokenLogprob | None = None,
        stopped_by: int | str | None = None,
        error: str | None = None,
    ) -> bool:
        """End an answer, and tell; True."""
        self._tell(answer, token, text, logprob, finish, stopped_by, error)
        asked = answer.asked
        asked.answers.remove(answer)
        if not asked.answers:
            del self.asked[asked.id]
        self._on_end(answer)
        return True

    def _tell(
        self,
        answer: Answer,
        token: int | None,
        text: str,
        logprob: TokenLogprob | None,
        finish: FinishReason | None = None,
        stopped_by: int | str | None = None,
        error: str | None = None,
    ) -> None:
        asked, cached, prompt = answer.asked, 0, None
        if not answer.told:
            answer.told, cached = True, answer.sequence.reused
            if asked.request.echo and answer.text:
                text = answer.text.echo(asked.request.prompt) + text
            if asked.request.prompt_logprobs is not None:
                prompt = tuple(asked.prompt_logprobs)
        number, index = asked.id, answer.index
        self._untold.append(Event(number, index, token, text, logprob, prompt, cached, finish, stopped_by, error))
