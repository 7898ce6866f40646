"""A request is answered as if it were alone, whatever runs beside it; and tests that see where it is not.

Many requests, of few beginnings, run through a cache too small for them, while adapters are loaded anew and requests
cancelled. Two judges: the model's plain forward over each answer, whose logits have to give the same tokens and
log-probabilities; and, which takes longer, each request alone in an engine of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.engines import adapted, adapter, engine_toy, small_engine

from arriero.infer import adapters as adapters_module
from arriero.infer.blocks import BlockPool
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.native_step import NativeStep
from arriero.infer.request import Completion, Event, Request, TokenLogprob, joined
from arriero.infer.sample import sample, score
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.speculate import Drafted, Lookup
from arriero.infer.step import BLOCK

ADAPTERS = {seed: adapter(seed) for seed in range(4)}
TOLERANCE = 1e-6  # of a log-probability; a step in torch adds up in another order in another batch


@dataclass
class Life:
    """A request, and the adapter that had its name when it came."""

    request: Request
    adapter: int | None
    events: list[Event]


def random_request(rng: random.Random, beginnings, adapters) -> Request:
    beginning = rng.choice(beginnings)
    cut = rng.choice((len(beginning), rng.randint(1, len(beginning))))
    prompt = beginning[:cut] + [rng.randrange(101) for _ in range(rng.choice((0, 1, 7, 40)))]
    sampling = rng.choice(
        (
            SamplingConfig(temperature=1.0, seed=rng.randrange(1000)),
            SamplingConfig(temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=rng.randrange(1000)),
            SamplingConfig(),
        )
    )
    request = Request(
        prompt or [5], rng.choice((1, 3, 11, 40)), sampling, n=rng.choice((1, 1, 1, 3)), stop_ids={3}, logprobs=0,
        adapter=rng.choice((None, *adapters)), salt=rng.choice(("", "", "b")),
    )  # fmt: skip
    if rng.random() < 0.1:
        return replace(request, prompt_logprobs=0, prompt_logprobs_from=rng.randint(1, len(request.prompt)))
    return request


def live(engine: Engine, rng: random.Random, n: int, at_once: int = 24) -> list[Life]:
    """Let an engine live through `n` requests; returns those that were not cancelled."""
    beginnings = [[rng.randrange(101) for _ in range(size)] for size in (33, 64, 96, 130)]
    beginnings.append([rng.randrange(101) for _ in range(3)] * 20)
    holds: dict[str, int] = {}
    lives: dict[int, Life] = {}
    cancelled, under_way = set(), set()
    while len(lives) < n or engine.busy:
        if rng.random() < 0.05 or not holds:
            name, seed = rng.choice("xy"), rng.choice(list(ADAPTERS))
            engine.load_adapter(name, ADAPTERS[seed])
            holds[name] = seed
        elif rng.random() < 0.02:
            name = rng.choice(list(holds))
            engine.unload_adapter(name)
            del holds[name]
        while len(lives) < n and len(under_way) < at_once and rng.random() < 0.7:
            request = random_request(rng, beginnings, holds)
            number = engine.submit(request)
            lives[number] = Life(request, holds[request.adapter] if request.adapter else None, [])
            under_way.add(number)
        if under_way and rng.random() < 0.05:
            number = rng.choice(sorted(under_way))
            engine.cancel(number)
            cancelled.add(number)
        for event in engine.step():
            lives[event.request].events.append(event)
            if event.finish is not None and sum(e.finish is not None for e in lives[event.request].events) == (
                lives[event.request].request.n
            ):
                under_way.discard(event.request)
    return [life for number, life in lives.items() if number not in cancelled]


def answers_of(life: Life) -> list[Completion]:
    return [joined([e for e in life.events if e.index == i]) for i in range(life.request.n)]


class Alone:
    """The same answers, each from an engine that does nothing else, and remembers nothing."""

    def __init__(self, model):
        self.model, self.engines = model, {}

    def __call__(self, life: Life) -> list[Completion]:
        engine = self.engines.get(life.adapter)
        if engine is None:
            engine = self.engines[life.adapter] = small_engine(self.model, 8, max_running=1, step_tokens=331)
            if life.adapter is not None:
                engine.load_adapter("it", ADAPTERS[life.adapter])
        answers, request, sampling = [], life.request, life.request.sampling
        for i in range(request.n):
            engine._scheduler.pool.forget()
            seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)
            mine = replace(request, n=1, sampling=seeded, adapter=request.adapter and "it")
            answers += engine.generate([mine])[0]
        return answers


@torch.no_grad()
def by_forward(model, life: Life) -> list[Completion]:
    """The same answers, token for token by the logits of the answers that were given."""
    request, answers = life.request, []
    for i, given in enumerate(answers_of(life)):
        ids = [*request.prompt, *given.ids]
        said = [*given.ids, given.stopped_by] if given.stopped else given.ids
        logits = model(torch.tensor([ids]))[0].float()
        n, seed = len(request.prompt), (request.sampling.seed or 0) + i
        rows = [
            SamplerRow(request.sampling, request.prompt, seed=seed, answer=given.ids[:k], logprobs=True)
            for k in range(len(said))
        ]
        chosen = sample(logits[n - 1 :][: len(said)], rows)
        tokens = chosen.ids.tolist()
        logprobs = [TokenLogprob(*pair) for pair in zip(chosen.raw, chosen.sampled, strict=True)]
        scores, at = None, request.prompt_logprobs_from
        if request.prompt_logprobs is not None:
            scores = [TokenLogprob(raw) for raw in score(logits[at - 1 : n - 1], request.prompt[at:]).raw]
        stopped = tokens[-1] if tokens[-1] in request.stop_ids else None
        finish = "length" if stopped is None else "stop"
        answers.append(Completion(tokens[: len(given.ids)], "", finish, stopped, logprobs, scores))
    return answers


def apart(one: TokenLogprob, other: TokenLogprob) -> float:
    return max(abs(one.raw - other.raw), abs((one.sampled or 0) - (other.sampled or 0)))


def differs(one: Completion, other: Completion, tolerance: float) -> bool:
    def near(a: list[TokenLogprob] | None, b: list[TokenLogprob] | None) -> bool:
        if a is None or b is None:
            return a is b
        return len(a) == len(b) and max((apart(*pair) for pair in zip(a, b, strict=True)), default=0) <= tolerance

    return not (
        (one.ids, one.finish, one.stopped_by) == (other.ids, other.finish, other.stopped_by)
        and near(one.logprobs, other.logprobs)
        and near(one.prompt_logprobs, other.prompt_logprobs)
    )


def wrong(lives: list[Life], judge, tolerance: float = TOLERANCE) -> int:
    """How many answers are not those that the judge gives."""
    return sum(differs(*pair, tolerance) for life in lives for pair in zip(answers_of(life), judge(life), strict=True))


@pytest.fixture(scope="module")
def models():
    """The toy as it is, and with each adapter; in fp64, so by the step in torch."""
    model = engine_toy()
    return {None: model} | {seed: adapted(model, given) for seed, given in ADAPTERS.items()}


@pytest.fixture
def judge(models):
    return lambda life: by_forward(models[life.adapter], life)


def lived(model, n, seed, **settings) -> list[Life]:
    """Many requests in a small engine, which had to preempt and could share."""
    engine = small_engine(model, 18, max_running=16, step_tokens=48, **settings)
    lives = live(engine, random.Random(seed), n)
    assert engine.preemptions > n // 10 and sum(e.cached > 0 for life in lives for e in life.events) > n // 5
    assert len(lives) > n * 0.8
    return lives


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("n", [150, pytest.param(2000, marks=SLOW)])
def test_by_the_step_in_torch_every_answer_is_the_one_that_its_request_gets_alone(models, judge, n):
    lives = lived(models[None], n, n)
    assert wrong(lives, judge) == 0
    assert wrong(lives[:: n // 20], Alone(models[None])) == 0


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=SLOW)])
@pytest.mark.parametrize("speculate", [0, 6])
def test_by_the_step_in_cpp_every_answer_is_so_bit_for_bit(native, n, speculate, monkeypatch):
    proposed, accepted, learn = [], [], Lookup.learn
    monkeypatch.setattr(
        Lookup, "learn", lambda *args: (proposed.append(args[1]), accepted.append(args[2]), learn(*args))
    )
    model = engine_toy(dtype=torch.bfloat16)
    assert isinstance(small_engine(model, 1)._model_step, NativeStep)
    assert wrong(lived(model, n, n, speculate=speculate), Alone(model), tolerance=0) == 0
    assert not speculate or sum(proposed) > sum(accepted) > n // 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["cpp", "torch"])
@pytest.mark.parametrize("seed", [0, 9], ids=["itself", "another"])
def test_a_draft_changes_no_answer_and_what_agrees_is_taken(native, dtype, seed, monkeypatch):
    proposed, accepted, learn = [], [], Drafted.learn
    monkeypatch.setattr(
        Drafted, "learn", lambda *args: (proposed.append(args[1]), accepted.append(args[2]), learn(*args))
    )
    model = engine_toy(dtype=dtype)
    lives = lived(model, 100, 5, speculate=3, draft=engine_toy(dtype=dtype, seed=seed))
    assert wrong(lives, Alone(model), tolerance=0 if dtype == torch.bfloat16 else TOLERANCE) == 0
    assert sum(accepted) > 300 if seed == 0 else sum(accepted) < sum(proposed) / 3


def test_one_block_that_two_sequences_hold_by_mistake_is_found_out(models, judge, monkeypatch):
    engine = small_engine(models[None], 18, max_running=16, step_tokens=48)
    take, planted = BlockPool.take, []

    def aliased(pool):
        block = take(pool)
        for victim in engine._scheduler.running:
            at = victim.computed // BLOCK
            goes_on = victim.left == 1 and victim.owner.asked.room - victim.owner.n_new > 5
            if (
                not planted
                and goes_on
                and victim.computed % BLOCK > 5
                and pool._references[victim.table.blocks[at]] == 1
            ):
                planted.append(victim)
                pool._give_back(block)
                block = victim.table.blocks[at]
                pool._references[block] += 1
        return block

    monkeypatch.setattr(BlockPool, "take", aliased)
    lives = live(engine, random.Random(1), 60)
    assert planted and wrong(lives, judge) > 0


def test_a_shared_block_that_is_written_to_is_found_out(models, judge, monkeypatch):
    monkeypatch.setattr(BlockPool, "shared", lambda pool, block: False)
    lives = live(small_engine(models[None], 18, max_running=16, step_tokens=48), random.Random(1), 60)
    assert wrong(lives, judge) > 0


def test_a_beginning_of_an_adapter_that_had_the_name_before_is_found_out(models, judge, monkeypatch):
    monkeypatch.setattr(adapters_module, "_digest", lambda config, tensors: b"the same")
    lives = live(small_engine(models[None], 18, max_running=16, step_tokens=48), random.Random(1), 60)
    assert wrong(lives, judge) > 0


def held() -> int:
    """Anonymous memory of this process, and what of it was swapped out."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(facts[name].split()[0]) for name in ("RssAnon", "VmSwap"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what memory a process has")
@pytest.mark.parametrize("n", [600, pytest.param(10_000, marks=SLOW)])
def test_memory_does_not_grow_once_the_cache_is_full(native, n):
    engine, rng = small_engine(engine_toy(dtype=torch.bfloat16), 64, max_running=16, step_tokens=48), random.Random(3)
    live(engine, rng, 300)
    before = held()
    live(engine, rng, n)
    assert held() < 1.01 * before
