"""The inference engine: requests in, events out, any number of them at once.

    engine = Engine(model, tokenizer)
    engine.submit(Request(tokenizer.encode("Once upon a time"), max_new_tokens=64))
    while engine.busy:
        for event in engine.step():
            print(event.text, end="")

The scheduler (scheduler.py) decides which tokens run in the next step, the step (step.py) computes them, the tokens
that follow are chosen (choose.py), and what they are to the requests under way is told in events (answers.py). One
thread drives an engine: no method may be called while another runs.

An engine serves the model as it stands, an adapter that it came with folded; loaded adapters act beside that model,
each on the requests that name it. Its memory is the weights as the step holds them plus `cache_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import CDLL
from pathlib import Path

from torch import Tensor

from arriero.errors import ConfigError, UserError, check
from arriero.infer import native_step
from arriero.infer.adapters import Adapter, Adapters
from arriero.infer.answers import Answer, Answers
from arriero.infer.blocks import blocks_for, root_key
from arriero.infer.choose import choose, logprob, propose, score_prompt
from arriero.infer.config import ActivationBits
from arriero.infer.draft import Draft
from arriero.infer.request import Completion, Event, Request, joined
from arriero.infer.scheduler import Plan, Scheduler
from arriero.infer.speculate import Drafted, Lookup
from arriero.infer.step import BLOCK, Step
from arriero.infer.torch_step import TorchStep, block_bytes, computed_in
from arriero.model.filed import hold
from arriero.model.llama import Llama
from arriero.model.lora_config import LoraConfig
from arriero.show.terminal import warn_once
from arriero.tokenizer.base import Tokenizer

CACHE_BYTES = 1 << 30


def open_step(model: Llama, context: int, n_blocks: int, activation_bits: ActivationBits = 15) -> Step:
    """The fastest step for this model, with so many blocks of cache: in C++ where it runs."""
    step: Step
    if library := _library(model, context):
        step = native_step.NativeStep(library, model, n_blocks, activation_bits=activation_bits)
    else:
        step = TorchStep(hold(model), n_blocks)
    used = isinstance(step, native_step.NativeStep) and step.integer
    if activation_bits != 15 and not used:
        why = "its matrices are not quantised (quantize=int8 or int4)" if library else "it runs through torch"
        warn_once(f"activation_bits is {activation_bits}, which changes nothing of this model: {why}")
    return step


def _block_bytes(model: Llama, context: int) -> int:
    """Memory of one block of cache of that step."""
    of = native_step.block_bytes if _library(model, context) else block_bytes
    return of(model.config, computed_in(model))


def _library(model: Llama, context: int) -> CDLL | None:
    return native_step.load_library() if native_step.fits(model, context) else None


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
        mixed_tokens: int = 0,
        context: int = 0,
        speculate: int = 0,
        draft: Llama | None = None,
        activation_bits: ActivationBits = 15,
    ) -> None:
        """tokenizer: None gives no texts, and knows no stop ids.

        cache_bytes: most memory for keys and values; or, where given, cache_tokens: for how many tokens. max_running:
        requests that are computed at a time. step_tokens: most tokens in one step, which bounds how long a request that
        is being answered waits for its next token. mixed_tokens: most tokens in a step in which answers go on,
        though prompts have at least one for each answer; 0: step_tokens. Small, it keeps answers fluent where requests
        come at any time; where all come at once it only makes more steps.
        context: most tokens of prompt and answer; 0 means the model's own. speculate: most tokens that are proposed at
        once, by what followed earlier in the text; which are right is decided exactly (speculate.py). draft: a smaller
        model of the same tokenizer, which proposes instead. activation_bits: to how many bits the inputs of int8 and
        int4 matrices are rounded. 15 loses nothing; 8 reads prompts 1.4 times as fast, and loses what
        docs/inference.md says. (The step in torch rounds none.) Raises `ConfigError` for values out of range.
        """
        check(speculate >= 0, f"speculate is {speculate}; it must be at least 0 (0: nothing is proposed)")
        check(max_running >= 1, f"max_running is {max_running}; it must be at least 1")
        check(
            step_tokens >= max_running,
            f"step_tokens is {step_tokens}; it must be at least max_running ({max_running}): each step has a token of "
            "every request that is being answered",
        )
        check(activation_bits in (8, 15), f"activation_bits is {activation_bits}; it must be 8 or 15")
        check(mixed_tokens >= 0, f"mixed_tokens is {mixed_tokens}; it must be at least 0 (0: step_tokens)")
        check(draft is None or speculate > 0, "a draft is given, and speculate is 0: say how many tokens it proposes")
        self.context, self._speculate = context or model.config.max_context, speculate
        models = [model] if draft is None else [model, draft]
        size = sum(_block_bytes(each, self.context) for each in models)
        n_blocks = blocks_for(cache_tokens) or min(cache_bytes // size, max_running * blocks_for(self.context))
        check(n_blocks > 0, f"cache_bytes is {cache_bytes:,}; one block of {BLOCK} tokens takes {size:,}")
        self._model_step, *others = (open_step(each, self.context, n_blocks, activation_bits) for each in models)
        self._draft = Draft(others[0]) if others else None
        for step in others:
            check(
                step.vocab_size == self._model_step.vocab_size,
                f"the draft has {step.vocab_size:,} tokens, the model {self._model_step.vocab_size:,}; take one of the "
                "same tokenizer",
            )
        self._answers = Answers(tokenizer, self._ended)
        self._scheduler = Scheduler(self._model_step.n_blocks, self.context, max_running, step_tokens, mixed_tokens)
        self._adapters = Adapters(model, self._model_step)
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
        return bool(self._answers)

    @property
    def preemptions(self) -> int:
        """How often a request had to give up its blocks to an earlier one."""
        return self._scheduler.preemptions

    @property
    def running(self) -> int:
        """Answers that are being computed."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Answers that wait for their turn."""
        return len(self._scheduler.waiting)

    @property
    def cache_usage(self) -> float:
        """Share of the cache that requests hold, from 0 to 1; what is only kept for later does not count."""
        pool = self._scheduler.pool
        return 1 - pool.available / pool.n_blocks

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Take a request, and return the number that its events will carry.

        Raises `ConfigError` for a prompt that leaves no room in the context or does not fit the cache, ids out of the
        vocabulary, an adapter that is not loaded, stop strings without a tokenizer.
        """
        room = self._answers.check(request, self._model_step.vocab_size, self.context, self.cache_tokens)
        adapter = self._adapters.use(request.adapter)
        asked = self._answers.add(
            request, room, adapter, self._root(request, adapter), lambda: self._proposals(request)
        )
        with self._change():
            self._scheduler.add(asked.sequences[0])
        return asked.id

    def cancel(self, request: int) -> bool:
        """End all answers to a request now; the next step tells. Returns whether there were any."""
        if (asked := self._answers.asked.get(request)) is None:
            return False
        with self._change():
            for answer in list(asked.answers):
                self._answers.finish(answer, "cancelled", text=answer.rest)
        return True

    def step(self) -> list[Event]:
        """Compute one step; returns what happened. Nothing happens while the engine is paused.

        An exception in it, Ctrl-C for one, loses no request: the next step goes on.
        """
        if self._answers.asked and not self._paused:
            if self._speculate:
                propose(self._scheduler.running, self._speculate)
            with self._change():
                if (plan := self._scheduler.plan()) is not None and plan.copies:
                    for step in self._steps:
                        step.copy_blocks(plan.copies)
            if plan is not None:
                if self._draft is not None:
                    self._draft.fill(plan, lambda sequence: sequence.owner.row)
                self._take(plan, self._model_step(plan.batch))
        return self._answers.take()

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
            left = sum(len(self._answers.asked[number].answers) for number in answers)
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
        self._answers.keep([event for event in events if event.request not in numbers])
        return [event for event in events if event.request in numbers]

    def _drop(self, numbers: Collection[int]) -> None:
        """End requests of which nobody wants to hear any more."""
        for number in numbers:
            if self.cancel(number):
                self._answers.forget(number)

    def _take(self, plan: Plan, logits: Tensor) -> None:
        """Make events of the logits of a step."""
        with self._change():
            for part in plan.parts:
                if part.scores:
                    score_prompt(part, logits, self._answers.words, self._model_step.share)
            ready = [pair for pair in self._scheduler.commit(plan) if self._constrained(pair[0].owner)]
        chosen = choose(ready, logits, self._model_step.share)
        with self._change():
            for answer, those, which in chosen:
                for i in which:
                    if i > which.start:
                        self._scheduler.accept(answer.sequence)
                    if self._answers.said(answer, int(those.ids[i]), logprob(answer, those, i)):
                        break
            for part in plan.parts:
                if not part.sequence.generates and part.sequence.left == 0:
                    self._answers.finish(part.sequence.owner, "length")

    def _proposals(self, request: Request) -> Lookup | Drafted | None:
        """What proposes tokens for one answer."""
        if not self._speculate:
            return None
        return Drafted(self._speculate) if self._draft else Lookup(list(request.prompt), self._speculate)

    def _constrained(self, answer: Answer) -> bool:
        """Let the sampler know what may follow by the answer's grammar; False where that ended the answer."""
        if answer.constraint is not None:
            try:
                answer.row.allowed = answer.constraint.mask()
            except UserError as error:
                self._answers.finish(answer, "error", text=answer.rest, error=str(error))
                return False
        return True

    def _ended(self, answer: Answer) -> None:
        """Give back an answer's blocks, and with the last one its adapter."""
        self._scheduler.remove(answer.sequence)
        if not answer.asked.answers:
            self._adapters.leave(answer.asked.adapter)

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
            for asked in self._answers.asked.values():
                for sequence in asked.sequences:
                    sequence.begin_at(self._root(asked.request, asked.adapter))
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
            self._scheduler.reset([each for asked in self._answers.asked.values() for each in asked.sequences])
        self._changing = True
        yield
        self._changing = False
