"""The engine: what requests get, in which order, and what is refused. That answers are right is test_isolation.py's."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.engines import SHAPE, adapted, adapter, engine_toy, small_engine

from arriero.errors import ConfigError
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.infer.torch_step import TorchStep

WARM = SamplingConfig(temperature=1.0, seed=5)


@pytest.fixture
def steps(monkeypatch):
    """The inputs of all steps from now on."""
    seen, run = [], TorchStep.__call__

    def watched(self, batch):
        seen.append(batch)
        return run(self, batch)

    monkeypatch.setattr(TorchStep, "__call__", watched)
    return seen


def prompt(n, seed=0):
    return torch.randint(20, 101, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def rest_of(engine):
    events = []
    while engine.busy:
        events += engine.step()
    return events


def raw_of(answer):
    return [p.raw for p in answer.prompt_logprobs]


def ids_of(answers):
    return [[answer.ids for answer in those] for those in answers]


def test_answers_to_one_prompt_compute_it_once_and_are_those_of_their_seeds(steps):
    model, asked = engine_toy(), Request(prompt(45), 9, WARM, n=4, stop_ids=())
    [four] = Engine(model).generate([asked])
    assert sum(len(batch.tokens) for batch in steps) == 45 + 4 * 8
    for i, answer in enumerate(four):
        one = replace(asked, n=1, sampling=replace(WARM, seed=5 + i))
        assert ids_of(Engine(model).generate([one])) == [[answer.ids]]
    assert len({tuple(answer.ids) for answer in four}) == 4


def test_nothing_is_proposed_before_the_answers_to_one_prompt_part(native):
    model, asked = engine_toy(dtype=torch.bfloat16), Request([7, 11, 13] * 11, 9, WARM, n=3, stop_ids=())
    engine = Engine(model, speculate=4, max_running=3, step_tokens=32)  # the prompt's last token is a step's first
    assert ids_of(engine.generate([asked])) == ids_of(Engine(model).generate([asked]))


def test_no_seed_draws_other_answers_each_time():
    engine = Engine(engine_toy())
    asked = Request(prompt(5), 9, SamplingConfig(temperature=1.0), stop_ids=())
    assert len({tuple(engine.generate([asked])[0][0].ids) for _ in range(5)}) == 5


def test_logprobs_say_of_which_distribution_they_are():
    model, ids = engine_toy(), prompt(7)
    warm = replace(WARM, temperature=0.7, top_k=9)
    logits = model(torch.tensor([ids]))[0].float()
    drawn_from = (logits[-1] / 0.7).masked_fill(logits[-1] < logits[-1].topk(9).values[-1], -math.inf)
    both = {"raw": logits[-1].log_softmax(-1), "sampled": drawn_from.log_softmax(-1)}
    for kind, expected in both.items():
        asked = Request(ids, 1, warm, stop_ids=(), logprobs=3, top_of=kind, prompt_logprobs=2)
        [[answer]] = Engine(model).generate([asked])
        [found] = answer.logprobs
        token = answer.ids[0]
        assert (found.raw, found.sampled) == pytest.approx([x[token].item() for x in both.values()], abs=1e-5)
        assert found.top_of == kind
        assert [token for token, _ in found.top] == expected.topk(3).indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
        raw = logits.log_softmax(-1)
        assert [p.sampled for p in answer.prompt_logprobs] == [None] * 6
        assert raw_of(answer) == pytest.approx([raw[i, ids[i + 1]].item() for i in range(6)], abs=1e-5)
        assert [p.top[0][0] for p in answer.prompt_logprobs] == raw[:-1].argmax(-1).tolist()


def test_a_prompt_can_be_scored_without_an_answer_and_from_a_place_on_with_the_cache(steps):
    model, ids = engine_toy(), prompt(100)
    engine = Engine(model, step_tokens=64)
    asked = Request(ids, 0, prompt_logprobs=0)
    [[whole]] = engine.generate([asked])
    assert (whole.ids, whole.finish, len(whole.prompt_logprobs)) == ([], "length", 99)
    assert sum(len(batch.outputs) for batch in steps) == 99
    [[end]] = engine.generate([replace(asked, prompt_logprobs_from=97)])
    assert raw_of(end) == pytest.approx(raw_of(whole)[96:])
    assert end.cached == 96 and len(steps[-1].tokens) == 4


def test_the_logits_of_a_long_prompt_are_never_all_there_at_once(steps):
    engine = Engine(engine_toy(), step_tokens=331)
    asked = Request(prompt(320), 0, prompt_logprobs=0, prompt_logprobs_from=20)
    [[answer]] = engine.generate([asked])
    assert len(answer.prompt_logprobs) == 300
    assert [len(batch.outputs) for batch in steps] == [109, 128, 63]


def test_a_stop_id_ends_an_answer_and_is_told_but_is_no_part_of_it():
    engine, asked = Engine(engine_toy()), Request(prompt(9), 20, stop_ids=())
    [[free]] = engine.generate([asked])
    stop = free.ids[4]
    events = list(engine.stream(replace(asked, stop_ids={stop}, logprobs=0)))
    assert [event.token for event in events] == free.ids[: free.ids.index(stop) + 1]
    assert all(event.logprob is not None for event in events)
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    assert (events[-1].finish, events[-1].stopped_by) == ("stop", stop)
    [[cut]] = engine.generate([replace(asked, stop_ids={stop})])
    assert (cut.ids, cut.finish, cut.stopped_by) == (free.ids[: free.ids.index(stop)], "stop", stop)
    assert (free.finish, free.stopped_by) == ("length", None)


def test_an_answer_ends_where_the_context_does():
    [[answer]] = Engine(engine_toy()).generate([Request(prompt(320), 100, stop_ids=())])
    assert (len(answer.ids), answer.finish) == (11, "length")


def test_echo_and_stop_strings_make_the_text_and_ids_stay_whole(tokenizer):
    engine, ids = Engine(engine_toy(), tokenizer), prompt(9)
    asked = Request(ids, 30, stop_ids=())
    [[free]] = engine.generate([asked])
    assert free.text == tokenizer.decode(free.ids)
    [[echoed]] = engine.generate([replace(asked, echo=True)])
    assert (echoed.text, echoed.ids) == (tokenizer.decode([*ids, *free.ids]), free.ids)
    stop = free.text[10:13]
    events = list(engine.stream(replace(asked, stop=(stop, "never"))))
    before = free.text[: free.text.index(stop)]
    assert "".join(event.text for event in events) == before
    assert (events[-1].finish, events[-1].stopped_by) == ("stop", stop)
    assert stop in tokenizer.decode([event.token for event in events])
    assert all("".join(e.text for e in events[:i]) == before[: sum(len(e.text) for e in events[:i])] for i in range(9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "the prompt is empty; give at least one token"),
        ({"prompt": [5] * 331}, "the prompt has 331 tokens, which leaves no room for an answer in a context of 331"),
        ({"prompt": [5] * 60, "max_new_tokens": 101}, "60 tokens and an answer of 101 need 160 .* there are 128; give"),
        ({"prompt": [5, 101]}, "the prompt has the id 101, and the model's are 0 to 100"),
        ({"prompt": [-1]}, "the prompt has the id -1"),
        ({"sampling": SamplingConfig(logit_bias={101: 1.0})}, "logit_bias names the id 101, and the model's are"),
        ({"adapter": "x"}, "the engine has no adapter 'x'; loaded are: a"),
        ({"stop": ("x",)}, "stop strings are given, and the engine has no tokenizer"),
        ({"stop": ("x", "")}, "a stop string is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1, or 0 with prompt_logprobs"),
        ({"n": 0}, "n is 0; it must be at least 1"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": 0, "prompt_logprobs_from": 3}, "prompt_logprobs_from is 3; .* its length of 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(changes, message):
    engine = small_engine(engine_toy(), 4)
    engine.load_adapter("a", adapter(1))
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request(**{"prompt": [5, 7], "max_new_tokens": 3} | changes))
    assert not engine.busy


def test_engines_that_cannot_be_are_refused():
    model = engine_toy()
    with pytest.raises(ConfigError, match=r"cache_bytes is 10; one block of 32 tokens takes 10,240"):
        Engine(model, cache_bytes=10)
    with pytest.raises(ConfigError, match="step_tokens is 3; it must be at least max_running"):
        Engine(model, step_tokens=3)
    with pytest.raises(ConfigError, match="max_running is 0"):
        Engine(model, max_running=0)
    with pytest.raises(ConfigError, match="a draft is given, and speculate is 0: say how many tokens it proposes"):
        Engine(model, draft=model)
    with pytest.raises(ConfigError, match="the draft has 103 tokens, the model 101; take one of the same tokenizer"):
        Engine(model, speculate=2, draft=engine_toy(replace(SHAPE, vocab_size=103)))


def test_the_cache_takes_no_more_than_its_budget():
    for dtype, smallest in ((torch.float64, 10_240), (torch.bfloat16, 3328)):  # by torch, and by C++
        memory = Engine(engine_toy(dtype=dtype), cache_bytes=99_999).memory
        assert 99_999 - smallest < memory["cache"] <= 99_999
        assert memory["weights"] > 0


@pytest.mark.parametrize("mixed", [0, 10])
def test_who_is_answered_gets_a_token_in_every_step_while_long_prompts_are_read(steps, mixed):
    engine = Engine(engine_toy(), max_running=8, step_tokens=40, mixed_tokens=mixed)
    early = [engine.submit(Request(prompt(5, i), 60, stop_ids=())) for i in range(3)]
    engine.step()
    late = [engine.submit(Request(prompt(200, i), 2, stop_ids=())) for i in range(9)]
    first = {}
    for step in itertools.takewhile(lambda _: engine.busy, itertools.count()):
        told = [event.request for event in engine.step()]
        assert step >= 59 or set(early) <= set(told)
        for number in told:
            first.setdefault(number, step)
    assert max(len(batch.tokens) for batch in steps) <= 40
    alone = [np.count_nonzero(np.bincount(batch.sequences) == 1) for batch in steps[1:59]]  # in which the first answer
    small = all(len(batch.tokens) <= max(10, 2 * n) for batch, n in zip(steps[1:59], alone, strict=True))
    assert small == bool(mixed)
    assert sorted(late, key=first.__getitem__) == late  # first come, first served
    assert len(set(first.values())) > 5


def test_where_blocks_are_short_the_youngest_waits_and_the_oldest_goes_on():
    model = engine_toy()
    engine = small_engine(model, 9)
    asked = [Request(prompt(60, i), 90, WARM, stop_ids=()) for i in range(4)]
    numbers = [engine.submit(request) for request in asked]
    ids, ended = {number: [] for number in numbers}, []
    while engine.busy:
        told = engine.step()
        assert not told or min(set(numbers) - set(ended)) in {event.request for event in told}
        for event in told:
            ids[event.request].append(event.token)
            ended += [event.request] if event.finish else []
    assert ended == numbers and engine.preemptions > 0
    assert list(ids.values()) == [answer[0].ids for answer in Engine(model).generate(asked)]


def test_a_request_is_cancelled_at_any_step_and_leaves_nothing_behind():
    model = engine_toy()
    for when in range(12):
        engine = small_engine(model, 12, max_running=3, step_tokens=16)
        numbers = [engine.submit(Request(prompt(40, i), 20, WARM, n=2, stop_ids=())) for i in range(4)]
        for _ in range(when):
            engine.step()
        cancelled = numbers[when % 4]
        ended = engine._answers.asked.get(cancelled) is None
        assert engine.cancel(cancelled) is not ended
        assert engine.cancel(cancelled) is False
        events = rest_of(engine)
        finish = [event.finish for event in events if event.request == cancelled and event.finish]
        assert finish == [] if ended else finish.count("cancelled") > 0
        assert [sum(e.finish == "length" for e in events if e.request == n) for n in numbers if n != cancelled] == [
            2
        ] * 3
        assert engine._scheduler.pool.available == 12


def test_a_stream_that_is_left_is_cancelled_and_others_go_on():
    engine = Engine(engine_toy())
    other = engine.submit(Request(prompt(9, 1), 9, stop_ids=()))
    stream = engine.stream(Request(prompt(9), 30, stop_ids=()))
    next(stream), next(stream)
    stream.close()
    events = rest_of(engine)
    assert [event.request for event in events] == [other] * 9


def test_equal_salts_share_beginnings_and_others_do_not(steps):
    engine = Engine(engine_toy())
    asked = Request(prompt(70), 1, stop_ids=())
    cached = [engine.generate([replace(asked, salt=salt)])[0][0].cached for salt in ("", "a", "a", "b", "")]
    assert cached == [0, 0, 69, 0, 69]
    assert [len(batch.tokens) for batch in steps] == [70, 70, 1, 70, 1]


def test_requests_that_begin_alike_and_come_together_compute_little_twice(steps):
    engine = Engine(engine_toy(), step_tokens=64)
    begin = prompt(256)
    engine.generate([Request([*begin, i], 1, stop_ids=()) for i in range(8)])
    assert sum(len(batch.tokens) for batch in steps) == 256 + 8


def test_a_name_loaded_anew_is_another_adapter_and_requests_under_way_keep_theirs():
    model, a, b = engine_toy(), adapter(1), adapter(2)
    engine = Engine(model)
    asked = Request(prompt(70), 12, stop_ids=(), adapter="x")
    expected = [Engine(adapted(model, given)).generate([replace(asked, adapter=None)])[0][0].ids for given in (a, b)]
    assert expected[0] != expected[1]
    engine.load_adapter("x", a)
    stream = engine.stream(asked)
    first = [next(stream).token for _ in range(3)]
    engine.load_adapter("x", b)
    [[second]] = engine.generate([asked])
    assert (second.ids, second.cached) == (expected[1], 0)
    assert first + [event.token for event in stream] == expected[0]
    engine.load_adapter("x", a)
    [[third]] = engine.generate([asked])
    assert (third.ids, third.cached) == (expected[0], 69)  # the same content
    engine.unload_adapter("x")
    assert engine.adapters == []
    with pytest.raises(ConfigError, match="no adapter 'x'; loaded are: none"):
        engine.unload_adapter("x")


def test_an_adapter_unloaded_under_way_leaves_with_its_last_request():
    engine = Engine(engine_toy())
    engine.load_adapter("x", adapter(1))
    stream = engine.stream(Request(prompt(7), 5, stop_ids=(), adapter="x"))
    next(stream)
    engine.unload_adapter("x")
    assert len(list(stream)) == 4
    assert not [name for name, _ in engine._model_step._model.named_parameters() if "lora" in name]


def test_adapters_that_do_not_fit_are_refused():
    engine, (config, tensors) = Engine(engine_toy()), adapter(1)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    for wrong, message in (
        (tensors | {name: torch.ones(2, 24)}, rf"adapter 'x': {name} is \[2, 24\], and its settings .* need \[3, 24\]"),
        ({n: t for n, t in tensors.items() if n != name}, rf"adapter 'x': {name} is no tensor, and .* need \[3, 24\]"),
        (tensors | {"y": torch.ones(2)}, r"adapter 'x': y is \[2\], and its settings on this model need no tensor"),
        (tensors | {name: torch.full((3, 24), torch.nan)}, rf"{name} holds values that are not finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.load_adapter("x", (config, wrong))
    assert engine.adapters == []


def test_new_weights_reach_requests_under_way_and_old_beginnings_are_gone():
    model, other = engine_toy(), engine_toy(seed=3)
    engine, fresh = Engine(model), Engine(engine_toy(seed=3))
    asked = Request(prompt(70), 12, stop_ids=())
    [[before]] = Engine(engine_toy()).generate([asked])
    stream = engine.stream(asked)
    first = [next(stream).token for _ in range(4)]
    assert first == before.ids[:4]
    with pytest.raises(ConfigError, match=r"refit: the engine is running; call pause\(\) first"):
        engine.refit("lm_head.weight", other.lm_head.weight)
    engine.pause()
    assert engine.step() == []
    with pytest.raises(ConfigError, match=r"paused for new weights, .* call resume\(\)"):
        engine.generate([asked])
    for name, tensor in other.state_dict().items():
        engine.refit(name, tensor)
    engine.resume()
    rest = [event.token for event in stream]
    [[expected]] = fresh.generate([Request([*asked.prompt, *first], 8, stop_ids=())])
    assert rest == expected.ids
    [[after]] = engine.generate([Request(asked.prompt, 12, stop_ids=(), prompt_logprobs=0)])
    [[expected]] = fresh.generate([Request(asked.prompt, 12, stop_ids=(), prompt_logprobs=0)])
    assert after.ids == expected.ids
    assert raw_of(after) == pytest.approx(raw_of(expected))


@pytest.mark.parametrize(
    "where", ["BlockPool.take", "BlockPool.fill", "Scheduler._input", "TorchStep.__call__", "sample"]
)
def test_an_interruption_anywhere_loses_no_request_and_no_token(where, monkeypatch):
    from arriero.infer import blocks, scheduler, torch_step
    from arriero.infer import choose as module

    owner, name = {
        "BlockPool.take": (blocks.BlockPool, "take"), "BlockPool.fill": (blocks.BlockPool, "fill"),
        "Scheduler._input": (scheduler.Scheduler, "_input"), "TorchStep.__call__": (torch_step.TorchStep, "__call__"),
        "sample": (module, "sample"),
    }[where]  # fmt: skip
    model = engine_toy()
    asked = [Request(prompt(40, i), 20, WARM, n=1 + i % 2, stop_ids=(), prompt_logprobs=0) for i in range(5)]
    expected = ids_of(Engine(model).generate(asked))
    kept, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args):
        if next(calls) % 7 == 0:
            raise KeyboardInterrupt
        return kept(*args)

    engine = small_engine(model, 13, max_running=4, step_tokens=24)
    numbers = [engine.submit(request) for request in asked]
    monkeypatch.setattr(owner, name, interrupted)
    ids, scored = {}, {}
    while engine.busy:
        try:
            for event in engine.step():
                ids.setdefault((event.request, event.index), []).append(event.token)
                if event.prompt_logprobs is not None:
                    scored[event.request] = len(event.prompt_logprobs)
        except KeyboardInterrupt:
            continue
    assert [[ids[n, i] for i in range(request.n)] for n, request in zip(numbers, asked, strict=True)] == expected
    assert list(scored.values()) == [39] * 5
    assert engine._scheduler.pool.available == 13
