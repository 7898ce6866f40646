"""The inference engine: requests in, events out, any number of them at once.

    engine = Engine(model, tokenizer)
    engine.submit(Request(tokenizer.encode("Once upon a time"), max_new_tokens=64))
    while engine.busy:
        for event in engine.step():
            print(event.text, end="")

The scheduler (scheduler.py) decides which tokens run in the next step, the step (step.py) computes them, and the tokens
that follow are chosen (sample.py). One thread drives an engine: no method may be called while another runs.

An engine serves the model as it stands, an adapter that it came with folded; loaded adapters act beside that model,
each on the requests that name it. Its memory is the weights as the step holds them plus `cache_bytes`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from arriero.errors import ConfigError, UserError, check
from arriero.infer import native_step
from arriero.infer.adapters import Adapter, Adapters
from arriero.infer.answer_text import AnswerText
from arriero.infer.blocks import blocks_for, root_key
from arriero.infer.draft import Draft
from arriero.infer.request import Completion, Event, FinishReason, Request, TokenLogprob, joined
from arriero.infer.row import Row
from arriero.infer.sample import Chosen, sample, score, token_words
from arriero.infer.scheduler import Part, Plan, Scheduler, Sequence
from arriero.infer.speculate import Drafted, Lookup, verify
from arriero.infer.step import BLOCK, Step
from arriero.infer.structured import Constraint
from arriero.infer.torch_step import TorchStep, block_bytes, computed_in
from arriero.model.llama import Llama
from arriero.model.lora_config import LoraConfig
from arriero.tokenizer.base import Tokenizer

CACHE_BYTES = 1 << 30
SPECULATIVE_ROWS = 16
"""Tokens of a step with proposals: more would cost as much as they may gain."""


def open_step(model: Llama, context: int, n_blocks: int) -> Step:
    """The fastest step for this model, with so many blocks of cache: in C++ where it runs."""
    library = _library(model, context)
    return native_step.NativeStep(library, model, n_blocks) if library else TorchStep(model, n_blocks)


def _block_bytes(model: Llama, context: int) -> int:
    """Memory of one block of cache of that step."""
    of = native_step.block_bytes if _library(model, context) else block_bytes
    return of(model.config, computed_in(model))


def _library(model: Llama, context: int) -> CDLL | None:
    return native_step.load_library() if native_step.fits(model, context) else None


@dataclass(eq=False)
class _Answer:
    """One of the answers to a request."""

    asked: _Asked
    index: int
    sequence: Sequence
    row: Row  # what the sampler knows of it
    text: AnswerText | None
    constraint: Constraint | None = None
    proposals: Lookup | Drafted | None = None
    told: bool = False  # whether an event of it has been made

    @property
    def n_new(self) -> int:
        return len(self.sequence.ids) - self.sequence.n_prompt

    def logprob(self, chosen: Chosen, i: int) -> TokenLogprob | None:
        """Of the token that was chosen in row i."""
        request = self.asked.request
        if request.logprobs is None:
            return None
        return TokenLogprob(float(chosen.raw[i]), float(chosen.sampled[i]), _pairs(chosen, i), request.top_of)


@dataclass(eq=False)
class _Asked:
    """A request under way."""

    id: int
    request: Request
    seed: int
    stop_ids: frozenset[int]
    room: int  # tokens that an answer may have
    adapter: Adapter | None
    answers: list[_Answer] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Engine:
    """Answers requests in batches; see the module, and docs/inference.md."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        cache_tokens: int = 0,
        max_running: int = 64,
        step_tokens: int = 256,
        context: int = 0,
        speculate: int = 0,
        draft: Llama | None = None,
    ) -> None:
        """tokenizer: None gives no texts, and knows no stop ids.

        cache_bytes: most memory for keys and values; or, where given, cache_tokens: for how many tokens. max_running:
        requests that are computed at a time. step_tokens: most tokens in one step, which bounds how long a request that
        is being answered waits for its next token.
        context: most tokens of prompt and answer; 0 means the model's own. speculate: most tokens that are proposed at
        once, by what followed earlier in the text; which are right is decided exactly (speculate.py). draft: a smaller
        model of the same tokenizer, which proposes instead. Raises `ConfigError` for values out of range.
        """
        check(speculate >= 0, f"speculate is {speculate}; it must be at least 0 (0: nothing is proposed)")
        check(max_running >= 1, f"max_running is {max_running}; it must be at least 1")
        check(
            step_tokens >= max_running,
            f"step_tokens is {step_tokens}; it must be at least max_running ({max_running}): each step has a token of "
            "every request that is being answered",
        )
        check(draft is None or speculate > 0, "a draft is given, and speculate is 0: say how many tokens it proposes")
        self.context, self._speculate = context or model.config.max_context, speculate
        models = [model] if draft is None else [model, draft]
        size = sum(_block_bytes(each, self.context) for each in models)
        n_blocks = blocks_for(cache_tokens) or min(cache_bytes // size, max_running * blocks_for(self.context))
        check(n_blocks > 0, f"cache_bytes is {cache_bytes:,}; one block of {BLOCK} tokens takes {size:,}")
        self._model_step, *others = (open_step(each, self.context, n_blocks) for each in models)
        self._draft = Draft(others[0]) if others else None
        for step in others:
            check(
                step.vocab_size == self._model_step.vocab_size,
                f"the draft has {step.vocab_size:,} tokens, the model {self._model_step.vocab_size:,}; take one of the "
                "same tokenizer",
            )
        self._tokenizer, self._words = tokenizer, token_words(tokenizer) if tokenizer else None
        self._scheduler = Scheduler(self._model_step.n_blocks, self.context, max_running, step_tokens)
        self._adapters = Adapters(model, self._model_step)
        self._asked: dict[int, _Asked] = {}
        self._next_id = 0
        self._untold: list[Event] = []  # events that the next step returns
        self._weights = 0  # how often they were replaced
        self._paused = False
        self._changing = False  # the scheduler's state, now

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values fit the cache."""
        return self._scheduler.pool.n_blocks * BLOCK

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights as they are held for computing ("weights"), and of keys and values ("cache")."""
        return {part: sum(step.memory[part] for step in self._steps) for part in ("weights", "cache")}

    @property
    def _steps(self) -> list[Step]:
        """The model's, and the draft's."""
        return [self._model_step] if self._draft is None else [self._model_step, self._draft.step]

    @property
    def busy(self) -> bool:
        """Whether a step would do or tell anything."""
        return bool(self._untold or self._asked)

    @property
    def preemptions(self) -> int:
        """How often a request had to give up its blocks to an earlier one."""
        return self._scheduler.preemptions

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Take a request, and return the number that its events will carry.

        Raises `ConfigError` for a prompt that leaves no room in the context or does not fit the cache, ids out of the
        vocabulary, an adapter that is not loaded, stop strings without a tokenizer.
        """
        room = self._room(request)
        tokenizer, stops = self._tokenizer, request.stop_ids
        if stops is None:
            stops = tokenizer.stop_ids if tokenizer else ()
        check(not request.stop or tokenizer is not None, "stop strings are given, and the engine has no tokenizer")
        seed = request.sampling.seed
        seed = secrets.randbits(62) if seed is None else seed
        adapter = self._adapters.use(request.adapter)
        asked = _Asked(self._next_id, request, seed, frozenset(stops), room, adapter)
        self._next_id += 1
        self._asked[asked.id] = asked
        root = self._root(request, adapter)
        for index in range(request.n):
            sequence = Sequence((asked.id, index), list(request.prompt), root, adapter.step_name if adapter else None)
            sequence.generates = room > 0
            text = AnswerText(tokenizer, request.stop) if tokenizer and request.text else None
            row = Row(
                request.sampling, request.prompt, seed=seed + index, words=self._words,
                logprobs=request.logprobs is not None, n_top=request.logprobs or 0, top_of=request.top_of,
            )  # fmt: skip
            constraint = request.grammar.begin() if request.grammar else None
            proposals = self._proposals(request) if self._speculate else None
            asked.answers.append(answer := _Answer(asked, index, sequence, row, text, constraint, proposals))
            sequence.owner = answer
        first, *others = (answer.sequence for answer in asked.answers)
        first.followers = others
        if request.prompt_logprobs is not None:
            first.scored_from = request.prompt_logprobs_from
        with self._change():
            self._scheduler.add(first)
        return asked.id

    def cancel(self, request: int) -> bool:
        """End all answers to a request now; the next step tells. Returns whether there were any."""
        if (asked := self._asked.get(request)) is None:
            return False
        with self._change():
            for answer in list(asked.answers):
                self._finish(answer, "cancelled", text=answer.text.flush() if answer.text else "")
        return True

    def step(self) -> list[Event]:
        """Compute one step; returns what happened. Nothing happens while the engine is paused.

        An exception in it, Ctrl-C for one, loses no request: the next step goes on.
        """
        if self._asked and not self._paused:
            if self._speculate:
                self._propose()
            with self._change():
                if (plan := self._scheduler.plan()) is not None and plan.copies:
                    for step in self._steps:
                        step.copy_blocks(plan.copies)
            if plan is not None:
                if self._draft is not None:
                    self._draft.fill(plan, lambda sequence: sequence.owner.row)
                self._take(plan, self._model_step(plan.batch))
        events, self._untold = self._untold, []
        return events

    def stream(self, request: Request) -> Iterator[Event]:
        """Submit a request and yield its events as they come; left early, it is cancelled."""
        number, finished = self.submit(request), 0
        try:
            while finished < request.n:
                for event in self._events_of({number}):
                    finished += event.finish is not None
                    yield event
        finally:
            self._drop({number})

    def generate(
        self, requests: Iterable[Request], *, on_done: Callable[[], None] = lambda: None
    ) -> list[list[Completion]]:
        """Answer all requests; returns the `n` answers to each, in the order given. on_done: called after each answer.

        Raises what `submit` raises, before anything is computed.
        """
        events: dict[tuple[int, int], list[Event]] = {}
        answers: dict[int, dict[int, Completion]] = {}
        try:
            for i, request in enumerate(requests):
                try:
                    answers[self.submit(request)] = {}
                except ConfigError as error:
                    raise ConfigError(f"request {i}: {error}") from error
            left = sum(len(self._asked[number].answers) for number in answers)
            while left:
                for event in self._events_of(answers):
                    key = event.request, event.index
                    events.setdefault(key, []).append(event)
                    if event.finish is not None:
                        answers[event.request][event.index] = joined(events.pop(key))
                        left -= 1
                        on_done()
        finally:
            self._drop(answers)
        return [[answer for _, answer in sorted(those.items())] for those in answers.values()]

    def _events_of(self, numbers: Container[int]) -> list[Event]:
        """One step, and what happened to these requests; the next step tells of the others."""
        if self._paused:
            raise ConfigError("the engine is paused for new weights, so nothing is answered; call resume() first")
        events = self.step()
        self._untold = [event for event in events if event.request not in numbers]
        return [event for event in events if event.request in numbers]

    def _drop(self, numbers: Collection[int]) -> None:
        """End requests of which nobody wants to hear any more."""
        for number in numbers:
            if self.cancel(number):
                self._untold = [event for event in self._untold if event.request != number]

    def _room(self, request: Request) -> int:
        """Tokens that the answer may have."""
        prompt = request.prompt
        size = self._model_step.vocab_size
        for token in request.sampling.logit_bias:
            check(token < size, f"logit_bias names the id {token}, and the model's are 0 to {size - 1:,}")
        if min(prompt) < 0 or max(prompt) >= size:
            wrong = next(i for i in prompt if not 0 <= i < size)
            raise ConfigError(f"the prompt has the id {wrong}, and the model's are 0 to {size - 1:,}")
        room = request.check_room(self.context)
        if (most := len(prompt) + max(room - 1, 0)) > self.cache_tokens:
            raise ConfigError(
                f"the prompt of {len(prompt):,} tokens and an answer of {room:,} need {most:,} tokens of cache, and "
                f"there are {self.cache_tokens:,}; give the engine more cache_bytes, or lower max_new_tokens"
            )
        return room

    def _take(self, plan: Plan, logits: Tensor) -> None:
        """Make events of the logits of a step."""
        with self._change():
            for part in plan.parts:
                if part.scores:
                    self._score(part, logits)
            ready = [pair for pair in self._scheduler.commit(plan) if self._constrained(pair[0].owner)]
        chosen = self._chosen(ready, logits)
        with self._change():
            for sequence, those, which in chosen:
                for i in which:
                    if i > which.start:
                        self._scheduler.accept(sequence)
                    if self._said(sequence.owner, int(those.ids[i]), sequence.owner.logprob(those, i)):
                        break
            for part in plan.parts:
                if not part.sequence.generates and part.sequence.left == 0:
                    self._finish(part.sequence.owner, "length")

    def _proposals(self, request: Request) -> Lookup | Drafted:
        """What proposes tokens for one answer."""
        return Drafted(self._speculate) if self._draft else Lookup(list(request.prompt), self._speculate)

    def _propose(self) -> None:
        """Let those that are being answered say what may follow, as many rows as a step takes at little more cost."""
        decoding = [sequence for sequence in self._scheduler.running if sequence.left == 1]
        most = min(self._speculate, SPECULATIVE_ROWS // max(len(decoding), 1) - 1)
        for sequence in decoding:
            answer = sequence.owner
            if not sequence.followers:  # which take over its blocks as they are behind the prompt
                sequence.proposed = answer.proposals.propose()[
                    : max(0, min(most, answer.asked.room - answer.n_new - 1))
                ]

    @staticmethod
    def _chosen(ready: list[tuple[Sequence, range]], logits: Tensor) -> list[tuple[Sequence, Chosen, range]]:
        """The tokens that follow each sequence: one, and those proposed that would have followed."""
        if not ready:
            return []
        wanted = [i for _, rows in ready for i in rows]
        if wanted != list(range(len(logits))):
            logits = logits[wanted]
        rows = [sequence.owner.row for sequence, _ in ready]
        if not any(sequence.proposed for sequence, _ in ready):
            chosen = sample(logits, rows)
            return [(sequence, chosen, range(i, i + 1)) for i, (sequence, _) in enumerate(ready)]
        proposals = [sequence.proposed for sequence, _ in ready]
        verified = verify(logits, rows, proposals, [sequence.owner.constraint for sequence, _ in ready])
        for (sequence, _), each in zip(ready, verified, strict=True):
            if sequence.proposed:
                sequence.owner.proposals.learn(len(sequence.proposed), len(each.ids) - 1)
            sequence.proposed = []
        return [(sequence, each, range(len(each.ids))) for (sequence, _), each in zip(ready, verified, strict=True)]

    def _constrained(self, answer: _Answer) -> bool:
        """Let the sampler know what may follow by the answer's grammar; False where that ended the answer."""
        if answer.constraint is not None:
            try:
                answer.row.allowed = answer.constraint.mask()
            except UserError as error:
                self._finish(answer, "error", text=answer.text.flush() if answer.text else "", error=str(error))
                return False
        return True

    def _score(self, part: Part, logits: Tensor) -> None:
        """Log-probabilities of tokens of a prompt."""
        asked, at = part.sequence.owner.asked, part.scored_from
        targets = part.sequence.ids[at : at + len(part.scores)]
        ours = logits[part.scores.start : part.scores.stop]
        found = score(ours, targets, self._scorer(asked.request))
        begin = at - asked.request.prompt_logprobs_from  # after an interruption they may be there already
        asked.prompt_logprobs[begin:] = [
            TokenLogprob(float(raw), top=_pairs(found, i)) for i, raw in enumerate(found.raw)
        ]

    def _scorer(self, request: Request) -> Row:
        """How many of the most probable tokens are listed, of those that the tokenizer has."""
        return Row(request.sampling, seed=0, words=self._words, n_top=request.prompt_logprobs or 0)

    def _said(self, answer: _Answer, token: int, logprob: TokenLogprob | None) -> bool:
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
            return self._finish(answer, "error", token, piece, logprob, error=str(error))
        if token in answer.asked.stop_ids:
            return self._finish(answer, "stop", token, text.flush() if text else "", logprob, token)
        piece = text.push(token) if text else ""
        if text and text.stopped_by is not None:
            return self._finish(answer, "stop", token, piece, logprob, text.stopped_by)
        if ended or answer.n_new >= answer.asked.room:
            piece += text.flush() if text else ""
            return self._finish(answer, "stop" if ended else "length", token, piece, logprob)
        self._tell(answer, token, piece, logprob)
        return False

    def _finish(
        self,
        answer: _Answer,
        finish: FinishReason,
        token: int | None = None,
        text: str = "",
        logprob: TokenLogprob | None = None,
        stopped_by: int | str | None = None,
        error: str | None = None,
    ) -> bool:
        """End an answer, give back its blocks, and tell; True."""
        self._tell(answer, token, text, logprob, finish, stopped_by, error)
        asked = answer.asked
        asked.answers.remove(answer)
        if not asked.answers:
            del self._asked[asked.id]
        self._scheduler.remove(answer.sequence)
        if not asked.answers:
            self._adapters.leave(asked.adapter)
        return True

    def _tell(
        self,
        answer: _Answer,
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

    # -- adapters and weights ----------------------------------------------------------------------------------------

    def load_adapter(self, name: str, source: str | Path | tuple[LoraConfig, Mapping[str, Tensor]]) -> None:
        """Serve an adapter under a name: of a PEFT directory or Hub id, or settings and tensors (see `lora_state`).

        A name that is taken is replaced: requests under way end with the adapter that they began with. Cached
        beginnings belong to an adapter's content, so none of another is ever used. Raises what `read_adapter` raises,
        and `ConfigError` for tensors that do not fit the model.
        """
        self._adapters.load(name, source)

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; it leaves memory with the last one under way."""
        self._adapters.unload(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return self._adapters.names

    def pause(self) -> None:
        """Stop, to take new weights: steps compute nothing until `resume`."""
        with self._change():
            self._scheduler.preempt_all()
        self._paused = True

    def refit(self, name: str, tensor: Tensor) -> None:
        """Replace the weight of that name (as in `Llama.state_dict`), in place. Raises `ConfigError` unless paused."""
        if not self._paused:
            raise ConfigError("refit: the engine is running; call pause() first, and resume() after the last tensor")
        self._model_step.refit(name, tensor)

    def resume(self) -> None:
        """Go on with the weights as they are now. Requests under way keep their tokens; all else is computed anew."""
        self._weights += 1
        with self._change():
            self._scheduler.pool.forget()
            for asked in self._asked.values():
                for answer in asked.answers:
                    answer.sequence.begin_at(self._root(asked.request, asked.adapter))
                if (first := asked.answers[0]).index == 0 and not first.told and asked.prompt_logprobs:
                    asked.prompt_logprobs.clear()
                    first.sequence.scored_from = asked.request.prompt_logprobs_from
        self._paused = False

    def _root(self, request: Request, adapter: Adapter | None) -> bytes:
        """What decides keys and values beside the tokens."""
        return root_key(self._weights, adapter.digest if adapter else None, request.salt)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change of the scheduler's state. One that was interrupted costs the cache: all is computed again."""
        if self._changing:
            self._scheduler.reset([answer.sequence for asked in self._asked.values() for answer in asked.answers])
        self._changing = True
        yield
        self._changing = False


def _pairs(chosen: Chosen, i: int) -> tuple[tuple[int, float], ...]:
    """The most probable tokens of row i with their log-probabilities."""
    ids, logprobs = chosen.top[i]
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
