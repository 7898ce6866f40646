"""Speculation through the engine: the same answers over many prompts, the same distribution, fewer steps."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from helpers.engines import SHAPE, adapter, engine_toy
from scipy.stats import chi2

from arriero.checkpoint.load import load
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.native_step import NativeStep
from arriero.infer.request import Request
from arriero.infer.speculate import Drafted, Lookup
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig

SMALL = replace(SHAPE, vocab_size=11)  # so few tokens that every pair is common


def counting(monkeypatch, kind) -> Counter:
    """Proposed and accepted tokens from now on."""
    found, learn = Counter(), kind.learn

    def counted(self, proposed, accepted):
        found.update(proposed=proposed, accepted=accepted)
        learn(self, proposed, accepted)

    monkeypatch.setattr(kind, "learn", counted)
    return found


@pytest.mark.parametrize("drafts", [False, True], ids=["look-up", "draft"])
def test_tokens_are_distributed_as_the_model_says(drafts, monkeypatch):
    model = engine_toy(SMALL, torch.float32)
    found = counting(monkeypatch, Drafted if drafts else Lookup)
    draft = engine_toy(SMALL, torch.float32, seed=3) if drafts else None
    prompt, n, warm = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 3000, SamplingConfig(temperature=1.5)
    [[likely]] = Engine(model).generate([Request(prompt, 4, stop_ids=())])
    monkeypatch.setattr(Lookup, "propose", lambda self: likely.ids[len(self.ids) - len(prompt) :])
    engine = Engine(model, speculate=3, draft=draft, cache_tokens=4096, max_running=3)
    requests = [Request(prompt, 4, replace(warm, seed=seed), stop_ids=(), text=False) for seed in range(n)]
    triples = Counter(tuple(answer.ids[1:4]) for [answer] in engine.generate(requests))
    assert min(found["accepted"], found["proposed"] - found["accepted"]) > n / 10
    p = torch.ones(1, dtype=torch.float64)
    ids = torch.tensor([prompt])
    for _ in range(4):  # the probability of each answer, and then of the last three tokens of it
        logits = torch.cat([model(part)[:, -1] for part in ids.split(2000)])
        p = (p[:, None] * (logits.double() / 1.5).softmax(-1)).flatten()
        ids = torch.cat([ids.repeat_interleave(11, 0), torch.arange(11).repeat(len(ids))[:, None]], 1)
    expected = n * p.view(11, -1).sum(0).numpy()
    seen = np.array([triples[tuple(three)] for three in ids[: 11**3, -3:].tolist()])
    common = expected >= 5
    rest = expected[~common].sum()
    statistic = ((seen - expected) ** 2 / expected)[common].sum() + (seen[~common].sum() - rest) ** 2 / rest
    assert common.sum() > 50 and statistic < chi2.ppf(1 - 1e-4, common.sum())


def test_a_text_that_repeats_itself_takes_fewer_steps(monkeypatch):
    model = engine_toy(dtype=torch.bfloat16)
    request = Request([5, 6, 7] * 9, 120, stop_ids=())
    steps, answers = [], []
    for speculate in (0, 8):
        engine, n = Engine(model, speculate=speculate), 0
        engine.submit(request)
        ids = []
        while engine.busy:
            ids += [event.token for event in engine.step()]
            n += 1
        steps.append(n)
        answers.append(ids)
    assert answers[0] == answers[1] and steps[1] < 0.8 * steps[0]


PIECES = [(1, range(40)), (3, range(40, 140)), (16, range(140, 320)), (16, range(320, 500))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("most", "part"), PIECES, ids=[f"{len(part)} by {most}" for most, part in PIECES])
def test_five_hundred_greedy_answers_are_the_same_tokens(most, part, smollm2_gguf, monkeypatch):
    model, tokenizer = load(smollm2_gguf, dtype=torch.bfloat16)
    config = LoraConfig(rank=4, targets=("q_proj", "v_proj", "down_proj"))
    with torch.device("meta"):
        other = add_lora(Llama(model.config), config)
    tensors = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02
        for name, p in lora_state(other).items()
    }
    rng, text = random.Random(0), "\n".join(topics.values())
    requests = []
    for i in range(500):
        at = rng.randrange(len(text) - 400)
        piece = text[at : at + rng.randint(40, 240)]
        asked = f"{piece}\n\nAgain, word for word:\n\n" if i % 2 else piece
        requests.append(Request(tokenizer.encode(asked), 24, stop_ids=(), adapter="one" if i % 3 == 0 else None))
    found = counting(monkeypatch, Lookup)
    monkeypatch.setattr("arriero.infer.choose.SPECULATIVE_ROWS", 1 << 10)  # in batches too, where it would be off
    answers = []
    for speculate, at_once in ((0, 16), (8, most)):  # without speculation, answers are the same in every batch
        engine = Engine(model, tokenizer, speculate=speculate, max_running=at_once, context=512)
        assert isinstance(engine._model_step, NativeStep)
        engine.load_adapter("one", (config, tensors))
        answers.append([answer.ids for [answer] in engine.generate([requests[i] for i in part])])
    assert len(answers[0]) == len(part) and answers[0] == answers[1]
    assert found["accepted"] > len(part), "proposals were taken"


def test_an_adapter_that_acts_changes_no_token_either():
    model = engine_toy(dtype=torch.bfloat16)
    requests = [Request([5, 6, 7] * 5 + [i], 40, stop_ids=(), adapter=("one", None)[i % 2]) for i in range(6)]
    answers = []
    for speculate in (0, 4):
        engine = Engine(model, speculate=speculate, max_running=4)
        engine.load_adapter("one", adapter(1))
        answers.append([answer.ids for [answer] in engine.generate(requests)])
    assert answers[0] == answers[1]
