"""The sampler: filters against transformers', random numbers against numpy's, C++ against torch, draws against
arithmetic and chi-square."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from arriero.errors import ConfigError
from arriero.infer import sample as sampling
from arriero.infer import sample_twin as twin
from arriero.infer.config import SamplingConfig
from arriero.infer.sample import NothingAllowed, sample, score
from arriero.infer.sampler_row import SamplerRow

SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k of more than there are": {"top_k": 100_000},
    "top_p": {"top_p": 0.9},
    "top_p of nearly nothing": {"top_p": 0.001},
    "top_p of nearly all": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "top_k and top_p": {"top_k": 50, "top_p": 0.8},
    "all filters": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.3},
    "counts": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    "bias": {"logit_bias": {3: 5.0, 11: -100.0}},
    "everything": {
        "repetition_penalty": 1.1,
        "temperature": 0.9,
        "top_k": 97,
        "top_p": 0.95,
        "min_p": 0.01,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 2.5, 7: -1.5},
    },
}
PROMPT, ANSWER = [3, 5, 5, 7, 90], [7, 7, 11, 3]


@pytest.fixture(params=[101, 1009, 5003])  # within a block of the C++ code, over two, and over many; no multiple of 16
def logits(request):
    return torch.randn(7, request.param, generator=torch.Generator().manual_seed(3)) * 3


def config_of(name: str, **more) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 1.0, **SETTINGS[name], **more})


def rows_of(name: str, n: int, **kwargs) -> list[SamplerRow]:
    return [
        SamplerRow(config_of(name), PROMPT, answer=ANSWER, seed=i, logprobs=True, n_top=100, top_of="sampled", **kwargs)
        for i in range(n)
    ]


def transformers_on(config: SamplingConfig, logits: torch.Tensor) -> torch.Tensor:
    """The distribution's logits, by transformers' processors in transformers' order."""
    ids = torch.tensor([PROMPT + ANSWER]).repeat(len(logits), 1)
    steps = LogitsProcessorList()
    if config.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in config.logit_bias.items()}))
    if config.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    out = steps(ids, logits.clone())
    for token in set(ANSWER):  # transformers has none; OpenAI's formula
        out[:, token] -= config.presence_penalty + config.frequency_penalty * ANSWER.count(token)
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(config.temperature))])
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(MinPLogitsWarper(config.min_p))
    return steps(ids, out)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_kept_and_their_probabilities_are_transformers(logits, name):
    expected = transformers_on(config_of(name), logits).log_softmax(-1)
    for row, want in zip(sample(logits, rows_of(name, len(logits))).top, expected, strict=True):
        ids, values = row
        kept = min(100, int(want.isfinite().sum()))
        assert len(ids) == kept
        torch.testing.assert_close(torch.from_numpy(values), want[torch.from_numpy(ids).long()], atol=2e-5, rtol=1e-5)
        assert np.all(np.diff(values) <= 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_log_probabilities_are_those_of_the_chosen_token(logits, name):
    config, chosen = config_of(name), sample(logits, rows_of(name, len(logits)))
    ids = torch.from_numpy(chosen.ids)[:, None]
    raw = logits.log_softmax(-1).gather(1, ids)[:, 0]
    drawn = transformers_on(config, logits).log_softmax(-1).gather(1, ids)[:, 0]
    torch.testing.assert_close(torch.from_numpy(chosen.raw), raw, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(chosen.sampled), drawn, atol=2e-5, rtol=1e-5)


@pytest.fixture
def through_torch(monkeypatch):
    """A function that runs another one without the C++ code."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "load_library", lambda: None)
            return function(*args)

    return run


def same(ours, theirs):
    assert ours.ids.tolist() == theirs.ids.tolist()
    np.testing.assert_allclose(ours.raw, theirs.raw, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours.sampled, theirs.sampled, atol=1e-5, rtol=1e-5)
    for (ids, values), (other_ids, other_values) in zip(ours.top, theirs.top, strict=True):
        assert ids.tolist() == other_ids.tolist()
        np.testing.assert_allclose(values, other_values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cpp_sampler_is_its_twin(logits, name, through_torch):
    assert sampling.load_library() is not None
    words = random_words(logits.shape[1], 1)
    for kwargs in ({}, {"words": words}):
        rows = rows_of(name, len(logits), **kwargs)
        rows[0].allowed = random_words(logits.shape[1], 2)
        rows[1].top_of, rows[1].native.top_of_sampled = "raw", 0
        same(sample(logits, rows), through_torch(sample, logits, rows))


def test_greedy_and_given_tokens_are_the_twins(logits, through_torch):
    rows = [SamplerRow(SamplingConfig(repetition_penalty=1.4), PROMPT, logprobs=True, n_top=5) for _ in logits]
    same(sample(logits, rows), through_torch(sample, logits, rows))
    ids = list(range(5, 5 + len(logits)))
    same(score(logits, ids, rows[0]), through_torch(score, logits, ids, rows[0]))
    expected = logits.log_softmax(-1)[torch.arange(len(logits)), ids]
    torch.testing.assert_close(torch.from_numpy(score(logits, ids).raw), expected, atol=1e-5, rtol=1e-5)


def random_words(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, -(-n // 32), dtype=np.int32)


@pytest.mark.parametrize("many", [7, 101, 700])
@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.3}, {"top_k": 5, "top_p": 0.4}, {}])
def test_equal_logits_share_their_fate(many, setting, through_torch):
    """Of many equal logits none can be told from another: top-k and top-p keep all or none; greedy takes the first."""
    logits = torch.full((1, 1009), -9.0)
    logits[0, 100 : 100 + many] = 2.0
    logits[0, 50] = 2.5
    rows = [SamplerRow(SamplingConfig(temperature=1.0, **setting), seed=1, logprobs=True, n_top=1009, top_of="sampled")]
    ids, _ = sample(logits, rows).top[0]
    assert ids[0] == 50 and set(range(100, 100 + many)) <= set(ids.tolist())
    assert len(ids) == (1 + many if setting else 1009)
    same(sample(logits, rows), through_torch(sample, logits, rows))
    logits[0, 50] = 2.0
    assert sample(logits, [SamplerRow(SamplingConfig())]).ids.tolist() == [50]


def test_logits_of_any_scale_are_cut_right(through_torch):
    generator = torch.Generator().manual_seed(5)
    for scale in (1e-30, 1e-4, 1e4, 1e20, 1e28):
        logits = torch.randn(3, 2003, generator=generator) * scale
        logits[1, ::3] = -math.inf
        logits[2, ::5] = torch.finfo(torch.float32).min
        for setting in ({"top_k": 50}, {"top_p": 0.7}, {"top_k": 700, "top_p": 0.9}):
            row = SamplerRow(SamplingConfig(temperature=1.0, **setting), seed=1, n_top=2003, top_of="sampled")
            ours, theirs = sample(logits, [row] * 3), through_torch(sample, logits, [row] * 3)
            assert [ids.tolist() for ids, _ in ours.top] == [ids.tolist() for ids, _ in theirs.top]


def test_the_random_numbers_are_numpys_philox():
    for seed, index in ((0, 0), (1, 0), (0, 1), (7, 123_456), (2**64 - 1, 2**40)):
        theirs = np.random.Generator(np.random.Philox(key=seed, counter=(index - 1) % 2**256)).random()
        assert twin.uniform(seed, index) == theirs


def test_a_token_is_the_one_at_which_the_sum_exceeds_its_random_number():
    """So a draw is a function of seed and index alone; the C++ numbers are the twin's, and numpy's."""
    steps = 1009
    logits = torch.zeros(1, steps)
    for seed in range(50):
        row = SamplerRow(SamplingConfig(temperature=1.0), seed=seed, answer=[1] * seed)
        assert sample(logits, [row]).ids.tolist() == [int(twin.uniform(seed, seed) * steps)]


@pytest.mark.parametrize("name", SETTINGS)
def test_bits_do_not_depend_on_batch_or_threads(logits, name):
    rows = rows_of(name, len(logits))
    rows[3].allowed = random_words(logits.shape[1], 3)
    threads = torch.get_num_threads()
    try:
        alone = [sample(logits[i : i + 1], [row]) for i, row in enumerate(rows)]
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for order in (list(range(7)), [5, 3, 1, 0, 6], [2, 4] * 3):
                batch = sample(logits[order], [rows[i] for i in order])
                for at, i in enumerate(order):
                    assert batch.ids[at] == alone[i].ids[0]
                    assert batch.raw[at].tobytes() == alone[i].raw[0].tobytes()
                    assert batch.sampled[at].tobytes() == alone[i].sampled[0].tobytes()
                    assert batch.top[at][1].tobytes() == alone[i].top[0][1].tobytes()
    finally:
        torch.set_num_threads(threads)


def test_a_request_taken_up_again_draws_the_same_tokens():
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(1, 101, generator=generator) for _ in range(130)]
    config = SamplingConfig(1.2, 1.0, 0, 0.95, 0.0, 5, 0.5, 0.5)
    row, drawn = SamplerRow(config, PROMPT), []
    for logits in steps:
        drawn.append(int(sample(logits, [row]).ids[0]))
        row.push(drawn[-1])
    assert row.answer.tolist() == drawn and row.prompt.tolist() == PROMPT
    again = SamplerRow(config, PROMPT, answer=drawn[:100])
    for logits, token in zip(steps[100:], drawn[100:], strict=True):
        assert sample(logits, [again]).ids.tolist() == [token]
        again.push(token)


@pytest.mark.parametrize("name", ["plain", "all filters", "everything"])
def test_drawn_frequencies_are_the_probabilities(name):
    """Chi-square over 20,000 draws, half by seed and half by index; a right sampler fails once in 10,000 seeds."""
    logits = torch.randn(1, 211, generator=torch.Generator().manual_seed(2)) * 2
    config = config_of(name)
    probabilities = transformers_on(config, logits)[0].double().softmax(-1).numpy()
    rows = [SamplerRow(config, PROMPT, answer=ANSWER, seed=i) for i in range(10_000)]
    for i in range(10_000):
        rows.append(SamplerRow(config, PROMPT, answer=ANSWER, seed=77))
        rows[-1].index = i
    drawn = np.bincount(sample(logits.expand(len(rows), -1), rows).ids, minlength=211)
    assert not drawn[probabilities == 0].any()
    order = np.argsort(-probabilities)
    expected, found = probabilities[order] * len(rows), drawn[order]
    common = expected >= 5
    e, f = np.append(expected[common], expected[~common].sum()), np.append(found[common], found[~common].sum())
    e, f = e[e > 0], f[e > 0]
    assert chi2.sf(((f - e) ** 2 / e).sum(), len(e) - 1) > 1e-4


def test_draws_of_neighbouring_seeds_and_tokens_are_independent():
    numbers = np.array([[twin.uniform(seed, index) for index in range(60)] for seed in range(60)])
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers, numbers.T)):
        off = a.size if a is not numbers else a.size - 60
        with np.errstate(all="ignore"):
            mask = np.ones(a.shape, bool) if a is not numbers else ~np.eye(60, dtype=bool)
        assert abs(np.corrcoef(a[mask], b[mask])[0, 1]) < 4 / math.sqrt(off / 2)


def test_penalties_count_prompt_or_answer():
    logits = torch.tensor([[2.0, 2.0, 2.0, -2.0]])

    def after(**settings):
        row = SamplerRow(
            SamplingConfig(temperature=1.0, **settings), [0, 0, 3], answer=[1, 1], seed=0, n_top=4, top_of="sampled"
        )
        ids, values = sample(logits, [row]).top[0]
        logs = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return [logs[i] - logs[2] for i in range(4)]

    assert after(repetition_penalty=2.0) == pytest.approx([-1, -1, 0, -6], abs=1e-5)  # both, and once
    assert after(presence_penalty=0.5) == pytest.approx([0, -0.5, 0, -4], abs=1e-5)  # the answer
    assert after(frequency_penalty=0.5) == pytest.approx([0, -1, 0, -4], abs=1e-5)  # each time


def test_only_allowed_tokens_are_drawn(through_torch):
    logits = torch.zeros(1, 101)
    logits[0, 40] = 50.0
    words = np.zeros(2, np.int32)  # ids 64 to 100 lie behind the mask: not allowed either
    words[0], words[1] = 1 << 5 | 1 << 9, -(2**31)
    for temperature in (0.0, 1.0):
        rows = [SamplerRow(SamplingConfig(temperature=temperature), seed=i) for i in range(60)]
        for row in rows:
            row.allowed = words
        for chosen in (sample(logits.expand(60, -1), rows), through_torch(sample, logits.expand(60, -1), rows)):
            assert set(chosen.ids.tolist()) == ({5} if temperature == 0 else {5, 9, 63})


def test_a_row_that_nothing_is_allowed_in_is_an_error_that_names_it(through_torch):
    logits, rows = torch.zeros(4, 101), [SamplerRow(SamplingConfig(temperature=1.0), seed=0) for _ in range(4)]
    rows[1].allowed = np.zeros(4, np.int32)
    rows[2].words, rows[2].allowed = np.array([1, 0, 0, 0], np.int32), np.array([2, 0, 0, 0], np.int32)
    rows[2].native.words, rows[2].native.n_words = rows[2].words.ctypes.data, 4
    rows[3].allowed = np.array([0, 0, 0, -1 << 5], np.int32)  # ids from 101 on
    for run in (sample, lambda *args: through_torch(sample, *args)):
        with pytest.raises(NothingAllowed, match=r"rows \[1, 2, 3\]: no token may follow") as error:
            run(logits, rows)
        assert error.value.rows == [1, 2, 3]


def test_logits_that_are_no_numbers_are_not_drawn(through_torch):
    for number in (math.nan, -math.inf):
        logits = torch.full((40, 101), number)
        logits[:, 7], logits[:, 50] = 1.0, 1.0
        rows = [SamplerRow(SamplingConfig(temperature=1.0, top_p=0.9), seed=i, logprobs=True) for i in range(40)]
        for chosen in (sample(logits, rows), through_torch(sample, logits, rows)):
            assert set(chosen.ids.tolist()) == {7, 50}
            np.testing.assert_allclose(chosen.sampled, math.log(0.5), rtol=1e-6)
            assert np.isnan(chosen.raw).all() == math.isnan(number)


def test_logits_of_diverged_weights_give_an_allowed_token(through_torch):
    logits = torch.full((60, 101), math.nan)
    rows = [SamplerRow(SamplingConfig(temperature=float(i % 2)), seed=i, logprobs=True) for i in range(60)]
    for row in rows:
        row.allowed = np.array([0, 0b1101, 0, 0], np.int32)
    for chosen in (sample(logits, rows), through_torch(sample, logits, rows)):
        assert set(chosen.ids[::2].tolist()) == {32} and set(chosen.ids[1::2].tolist()) == {32, 34, 35}
        assert np.isnan(chosen.raw).all() and np.isnan(chosen.sampled).all()


def test_a_logit_of_infinity_is_certain(through_torch):
    logits = torch.zeros(1, 101)
    logits[0, 13] = math.inf
    row = SamplerRow(SamplingConfig(temperature=0.1, top_p=0.9), seed=3, logprobs=True)
    for chosen in (sample(logits, [row]), through_torch(sample, logits, [row])):
        assert chosen.ids.tolist() == [13] and chosen.sampled.tolist() == [0.0] and np.isnan(chosen.raw).all()


def test_greedy_is_the_argmax_whatever_the_filters(logits):
    rows = [SamplerRow(SamplingConfig(top_k=3, top_p=0.1), seed=0) for _ in logits]
    assert sample(logits, rows).ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; it is a probability, in \(0, 1\]"),
        ({"top_k": -3}, "top_k is -3; it must be at least 0"),
        ({"top_k": 2**32 + 1}, "top_k is 4294967297; .* and below"),
        ({"min_p": 1.0}, r"min_p is 1.0; it is a share, in \[0, 1\)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; it must be at least 0 and below 2\*\*64"),
        ({"presence_penalty": 2.5}, r"presence_penalty is 2.5; it must be from -2 to 2 \(0: none\)"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan; it must be from -2 to 2"),
        ({"logit_bias": {5: 101.0}}, "logit_bias of token 5 is 101.0; it must be from -100 to 100"),
        ({"logit_bias": {-5: 1.0}}, "logit_bias names token -5; ids are from 0 on"),
        ({"logit_bias": {2**31: 1.0}}, "logit_bias names token 2147483648; ids are from 0 on, and below"),
    ],
)
def test_settings_out_of_range_are_refused_on_construction(setting, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**setting)


def test_vocabularies_of_any_sizes_take_turns(through_torch):
    """The C++ code keeps its memory from call to call, by the vocabulary's size."""
    for size in (1000, 1009, 13, 600, 1024, 1009):
        logits = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
        config = SamplingConfig(temperature=1.0, top_p=0.9, frequency_penalty=1.0, repetition_penalty=1.2)
        rows = [SamplerRow(config, [size - 1, 0], answer=[size - 1] * 3, seed=i, logprobs=True) for i in range(2)]
        same(sample(logits, rows), through_torch(sample, logits, rows))
