"""Speculation: the same text as without, whatever is proposed; and its distribution by chi-square."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.tokenizers import small_byte_level
from scipy.stats import chi2

from arriero.infer.config import SamplingConfig
from arriero.infer.sample import sample
from arriero.infer.sampler_row import SamplerRow
from arriero.infer.speculate import Lookup, verify
from arriero.infer.structured import Compiler

V = 263  # tokens of the toy, as many as small_byte_level's ids and three more
SETTINGS = {
    "greedy": SamplingConfig(),
    "greedy, penalised": SamplingConfig(repetition_penalty=1.3, frequency_penalty=0.2),
    "sampled": SamplingConfig(temperature=1.0, seed=5),
    "sampled, filtered, penalised": SamplingConfig(1.1, 0.8, 40, 0.9, 0.01, 5, 0.3, 0.4, {7: 2.0}),
}


def model(ids: list[int]) -> torch.Tensor:
    """Logits [V] that the last two tokens decide, as peaked as a real model's, and often repeating themselves."""
    generator = torch.Generator().manual_seed(hash((ids[-1] % 7, ids[-2] % 3)) % 2**31)
    return torch.randn(V, generator=generator) * 3


def plainly(config: SamplingConfig, prompt: list[int], n: int, constraint=None, seed: int = 5) -> list[int]:
    row, ids = SamplerRow(config, prompt, seed=seed), list(prompt)
    while len(ids) < len(prompt) + n and not (constraint and constraint.done):
        row.allowed = constraint.mask() if constraint else None
        token = int(sample(model(ids)[None], [row]).ids[0])
        if constraint:
            constraint.accept(token)
        row.push(token)
        ids.append(token)
    return ids[len(prompt) :]


def speculating(config, prompt, n, propose, constraint=None, seed: int = 5) -> tuple[list[int], int]:
    """The text, and the steps that it took."""
    row, ids, steps = SamplerRow(config, prompt, seed=seed), list(prompt), 0
    while len(ids) < len(prompt) + n and not (constraint and constraint.done):
        proposed = propose(ids)
        logits = torch.stack([model(ids + proposed[:j]) for j in range(len(proposed) + 1)])
        before = (row.index, row.answer.tolist(), row.allowed)
        [chosen] = verify(logits, [row], [proposed], [constraint] if constraint else None)
        assert (row.index, row.answer.tolist(), row.allowed) == before
        steps += 1
        for token in chosen.ids.tolist():
            row.push(token)
            ids.append(token)
            if constraint:
                constraint.accept(token)
    return ids[len(prompt) :][:n], steps


@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_is_the_one_without_speculation(name):
    config, prompt = SETTINGS[name], [1, 2, 3, 1, 2]
    expected = plainly(config, prompt, 120)
    whole = prompt + expected
    rng = random.Random(3)
    kinds = {
        "nothing": lambda ids: [],
        "the truth": lambda ids: whole[len(ids) : len(ids) + 5],
        "noise": lambda ids: [rng.randrange(V) for _ in range(rng.randrange(6))],
        "half of it": lambda ids: [t if rng.random() < 0.7 else 0 for t in whole[len(ids) : len(ids) + 6]],
        "looked up": lambda ids: Lookup(ids).propose(),
    }
    taken = {}
    for kind, propose in kinds.items():
        text, taken[kind] = speculating(config, prompt, 120, propose)
        assert text == expected, kind
    assert taken["nothing"] == 120 and taken["the truth"] == 20
    assert 20 < taken["half of it"] < 100
    if name == "greedy":
        assert taken["looked up"] < 60  # the toy repeats itself


def test_log_probabilities_are_those_without_speculation():
    config, prompt = SETTINGS["sampled, filtered, penalised"], [1, 2]
    expected = plainly(config, prompt, 5)
    row, plain, ids = (
        SamplerRow(config, prompt, logprobs=True, n_top=3),
        SamplerRow(config, prompt, logprobs=True, n_top=3),
        [1, 2],
    )
    logits = torch.stack([model(prompt + expected[:j]) for j in range(6)])
    [chosen] = verify(logits, [row], [expected])
    assert chosen.ids.tolist()[:5] == expected
    for j in range(6):
        one = sample(logits[j : j + 1], [plain])
        assert one.raw.tobytes() == chosen.raw[j : j + 1].tobytes()
        assert one.sampled.tobytes() == chosen.sampled[j : j + 1].tobytes()
        assert one.top[0][1].tobytes() == chosen.top[j][1].tobytes()
        plain.push(int(one.ids[0]))
        ids.append(int(one.ids[0]))


def test_requests_of_a_batch_are_verified_each_by_itself():
    config, prompts = SETTINGS["sampled"], [[1, 2], [3, 4, 5], [6, 7]]
    texts = [plainly(config, prompt, 6, seed=i) for i, prompt in enumerate(prompts)]
    proposals = [texts[0][:4], [], [texts[2][0], (texts[2][1] + 1) % V, 5]]
    rows = [SamplerRow(config, prompt, seed=i) for i, prompt in enumerate(prompts)]
    logits = torch.stack(
        [
            model(prompt + said[:j])
            for prompt, said in zip(prompts, proposals, strict=True)
            for j in range(len(said) + 1)
        ]
    )
    found = [chosen.ids.tolist() for chosen in verify(logits, rows, proposals)]
    assert found == [texts[0][:5], texts[1][:1], texts[2][:2]]


def test_a_grammar_holds_over_proposals():
    compiler = Compiler(small_byte_level())
    grammar = compiler.compile("regex", "[a-f]{9}(xy)*[0-9]{5}")
    compiler.close()
    config, prompt, rng = SETTINGS["sampled"], [1, 2], random.Random(1)
    for seed in range(5):
        expected = plainly(config, prompt, 60, grammar.begin(), seed)
        whole = prompt + expected + [0] * 9
        for propose in (
            lambda ids, whole=whole: whole[len(ids) : len(ids) + 4],
            lambda ids: [rng.randrange(V - 3) for _ in range(3)],
        ):
            text, _ = speculating(config, prompt, 60, propose, grammar.begin(), seed)
            assert text == expected


@pytest.mark.parametrize("proposed", ["likely", "unlikely"])
def test_the_second_token_is_distributed_as_without_speculation(proposed):
    """Chi-square of the token behind one proposal, over 6,000 seeds."""
    config, prompt = SamplingConfig(temperature=1.0, top_p=0.95), [1, 2]
    first = model(prompt)
    token = int(first.argmax()) if proposed == "likely" else int(first.sort(descending=True).indices[1])
    logits = torch.stack([first, model([*prompt, token])])
    n = 6000
    rows = [SamplerRow(config, prompt, seed=i) for i in range(n)]
    found = verify(logits.repeat(n, 1), rows, [[token]] * n)
    seconds = [int(chosen.ids[1]) for chosen in found if len(chosen.ids) == 2]
    probability = float(torch.softmax(first, -1)[token])
    assert len(seconds) > 0.8 * n * probability
    ids, logs = sample(logits[1:], [SamplerRow(config, prompt, seed=0, n_top=V, top_of="sampled")]).top[0]
    expected = np.exp(logs.astype(np.float64)) * len(seconds)
    counts = np.bincount(seconds, minlength=V)[ids]
    common = expected >= 5
    e = np.append(expected[common], max(expected[~common].sum(), 1e-9))
    f = np.append(counts[common], counts[~common].sum())
    assert counts.sum() == len(seconds)
    assert chi2.sf(((f - e) ** 2 / e).sum(), len(e) - 1) > 1e-4


def test_look_up_proposes_what_followed_the_longest_and_latest_match():
    assert Lookup([1, 2, 3, 4, 5, 9, 2, 3, 4], most=2).propose() == [5, 9]
    assert Lookup([1, 2, 7, 1, 2, 8, 1, 2], most=3).propose() == [8, 1, 2]  # the latest
    assert Lookup([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], most=1).propose() == [7]  # the longer
    assert Lookup([4, 1, 2, 1, 2, 1, 2], most=5).propose() == [1, 2, 1, 2, 1]  # a text that repeats itself
    assert Lookup([1, 2, 3]).propose() == [] and Lookup([1]).propose() == []
    grown = Lookup([])
    for token in [1, 2, 3, 4, 5, 9, 2, 3, 4]:
        grown.push(token)
    assert grown.propose() == Lookup(grown.ids).propose() != []


def test_look_up_rests_where_it_loses():
    lookup = Lookup([1, 2, 3] * 5, cost=0.2, rest=10)
    for _ in range(60):
        lookup.learn(8, 1)
    assert lookup.propose() == []
    for _ in range(10):
        lookup.push(1)
    lookup.push(2)
    assert lookup.propose() != []
    winning = Lookup([1, 2, 3] * 5, cost=0.2)
    for _ in range(60):
        winning.learn(8, 4)
    assert winning.propose() != [] and 0.3 < winning.rate < 0.6
