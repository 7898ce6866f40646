"""Against a plain loop over whole logits: nothing packed, nothing chunked. Against transformers: test_smollm2.py."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.errors import DataError
from arriero.eval.perplexity import perplexity, windows
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama


class Letters:
    """The smallest tokenizer: an id a letter. Only what perplexity asks of one."""

    eos_id = 2

    def __init__(self, bos_id: int | None = 1) -> None:
        self.bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 97 for letter in text]

    def text_bytes(self, ids: list[int], total: int) -> np.ndarray:
        return np.ones(len(ids))


@pytest.fixture(scope="module")
def toy() -> Llama:
    config = LlamaConfig(dim=44, n_layers=2, n_heads=11, n_kv_heads=11, ffn_dim=53, vocab_size=101, max_context=61)
    return Llama(config).init_weights(std=0.2, seed=3)


def reference_bits(model: Llama, ids: list[int], window: int, context: int) -> list[float]:
    """The definition as a plain loop: a forward a window, whole logits, log-softmax in fp64."""
    start = first = 0
    bits: list[float] = []
    while first < len(ids) - 1:
        end = min(start + window, len(ids) - 1)
        logprobs = model(torch.tensor([ids[start:end]]))[0].double().log_softmax(-1)
        bits += [-logprobs[i - start, ids[i + 1]].item() / math.log(2) for i in range(first, end)]
        first, start = end, end - context + 1
    return bits


TEXT = "An arriero leads llamas over the Andes; the llamas carry what he has, and more than he would like to say. "


def test_a_context_shorter_than_the_window_is_half_full_at_least_and_costs_two_forwards_a_token_at_most(toy):
    found = perplexity(toy, Letters(), TEXT, window=400, context=400)
    assert found.bits.tolist() == perplexity(toy, Letters(), TEXT, window=61, context=30).bits.tolist()
    assert len(found.bits) <= 2 * len(TEXT) / 61 + 2


@pytest.mark.parametrize(("window", "context"), [(61, 1), (61, 60), (17, 5)])
def test_long_text_equals_a_plain_loop_over_windows(toy, window, context):
    found = perplexity(toy, Letters(), TEXT, window=window, context=context)
    window = min(window, 61)
    bits = reference_bits(toy, [1, *Letters().encode(TEXT)], window, min(context, window - 1))
    assert found.tokens.sum() == len(bits) == len(TEXT)
    assert found.bits.sum() == pytest.approx(sum(bits), rel=1e-5)
    assert found.perplexity.value == pytest.approx(2 ** (sum(bits) / len(bits)), rel=1e-4)
    assert found.bits_per_byte.value == pytest.approx(sum(bits) / len(TEXT.encode()), rel=1e-5)


def test_every_token_is_scored_once_and_with_enough_before_it():
    seen: list[int] = []
    for window in windows(Letters(), TEXT, 17, 5):
        assert len(window.inputs) == len(window.targets) <= 17
        scored = [i for i, target in enumerate(window.targets) if target >= 0]
        assert scored[0] >= (4 if seen else 0)  # inputs 0..4 are five tokens before the one scored
        seen += [window.targets[i] for i in scored]
        assert len(scored) == window.scored
    assert seen == Letters().encode(TEXT)


def test_short_texts_share_forwards_and_do_not_see_each_other(toy):
    texts = [TEXT[i : i + 7 + i % 13] for i in range(0, 60, 3)] + ["", TEXT]
    together = perplexity(toy, Letters(), iter(texts), window=31, context=3)
    alone = [perplexity(toy, Letters(), text, window=31, context=3) for text in texts if text]
    assert together.documents == len(alone)
    assert np.allclose(together.bits, np.concatenate([one.bits for one in alone]), rtol=1e-5)
    assert together.bytes.sum() == pytest.approx(sum(len(text.encode()) for text in texts))


def test_a_bos_or_else_an_eos_stands_before_each_text(toy):
    with_bos, with_eos = (perplexity(toy, Letters(bos), "abc") for bos in (1, None))
    assert with_bos.tokens.sum() == with_eos.tokens.sum() == 3
    assert with_bos.bits.sum() == pytest.approx(
        sum(reference_bits(toy, [1, *Letters().encode("abc")], 61, 1)), rel=1e-5
    )
    assert with_eos.bits.sum() == pytest.approx(
        sum(reference_bits(toy, [2, *Letters().encode("abc")], 61, 1)), rel=1e-5
    )


def test_logits_of_a_whole_window_never_exist(toy, monkeypatch):
    widest = 0
    linear = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal widest
        out = linear(x, weight, bias)
        if out.shape[-1] == 101:
            widest = max(widest, out.numel() // 101)
        return out

    config = LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=11, vocab_size=101, max_context=2048)
    model = Llama(config).init_weights(seed=1)
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    perplexity(model, Letters(), TEXT * 18, window=1999, context=997)
    assert 0 < widest <= 256


def test_nothing_to_score_is_refused(toy):
    with pytest.raises(DataError, match="holds no text to score"):
        perplexity(toy, Letters(), ["", ""])
