"""Two models compared: what whole logits say, found layer by layer from the files, and nothing for the same one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.subjects import byte_level
from helpers.toys import toy_model

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, open_weights
from arriero.checkpoint.quantize import quantize
from arriero.errors import DataError
from arriero.eval.divergence import compare, divergence, read_texts
from arriero.eval.perplexity import perplexity, windows
from arriero.model.config import LlamaConfig

TEXTS = ["The llama hums, and the alpaca listens to it. " * 3, "¿Qué dice la llama? 你好"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_level()
    save_hf(
        toy_model(LlamaConfig(64, 2, 4, 2, 96, tokenizer.vocab_size, 48, tied_embeddings=True)), root / "m", tokenizer
    )
    quantize(root / "m", root / "q", type="int4")
    return root / "m", root / "q"


@torch.no_grad()
def test_it_is_what_whole_logits_say(models):
    found = compare(*models, TEXTS)
    (original, tokenizer), (other, _) = (load(path, dtype=torch.float32) for path in models)
    kl, same = [], []
    for text in TEXTS:
        for view in windows(tokenizer, text, 48, 47):
            p, q = (
                model(torch.tensor([view.inputs]))[0].log_softmax(-1)[-view.scored :] for model in (original, other)
            )
            kl += (p.exp() * (p - q)).sum(1).tolist()
            same += (p.argmax(1) == q.argmax(1)).tolist()
    assert found.tokens == len(kl)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert found.kl_error == pytest.approx(torch.tensor(kl).std().item() / math.sqrt(len(kl)), rel=0.05)
    assert found.same_top == pytest.approx(sum(same) / len(same))
    for model, ppl, bits in zip((original, other), found.perplexity, found.bits_per_byte, strict=True):
        measured = perplexity(model, tokenizer, TEXTS, window=48, context=47)
        assert ppl == pytest.approx(measured.perplexity.value, rel=1e-4)
        assert bits == pytest.approx(measured.bits_per_byte.value, rel=1e-4)


def test_a_model_does_not_diverge_from_itself(models):
    found = compare(models[0], models[0], TEXTS)
    assert abs(found.kl) < 1e-9
    assert found.same_top == 1
    assert found.perplexity[0] == found.perplexity[1]


def test_texts_that_are_none_are_named(models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"other": "b"}\n')
    with pytest.raises(DataError, match=r"row 2 of .*rows.jsonl: no text in a column 'text'; validation needs one"):
        read_texts(rows)
    weights = open_weights(models[0])
    with pytest.raises(DataError, match="holds no text to score"):
        divergence(weights, weights, load(models[0])[1], [""])
