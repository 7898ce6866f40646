"""A Qwen3 is pretrained, resumed, saved and opened elsewhere like any Llama, and decodes through torch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers.training import assert_same, whole_and_resumed

from arriero.checkpoint.load import load
from arriero.infer.config import SamplingConfig
from arriero.infer.generate import generate
from arriero.infer.native_step import fits
from arriero.model import catalogue as shapes
from arriero.model.config import Qwen3Config
from arriero.model.qwen3 import Qwen3
from arriero.train.config import LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig

SHAPE = Qwen3Config(34, 2, 6, 2, 29, 101, 64, norm_eps=1e-6, tied_embeddings=True, head_dim=22)


@pytest.fixture(autouse=True)
def toy_shape(monkeypatch):
    monkeypatch.setitem(shapes.LADDER, "toy", SHAPE)
    monkeypatch.setitem(shapes.SHAPES, "toy", SHAPE)


def settings(shards: Path, out: Path) -> PretrainConfig:
    return PretrainConfig(
        model="toy",
        out=str(out),
        prompts=("The",),
        z_loss=1e-4,
        data=PretrainDataConfig(train=str(shards), seq_len=64, validation_tokens=2000),
        optim=OptimConfig(optimizer="muon", lr=1e-2, warmup=2.0, weight_decay=0.1),
        loop=LoopConfig(
            steps=6, batch_rows=4, micro_rows=2, precision="fp32", validate_every=3, save_every=1, keep_last=9
        ),
    )


def test_pretrained_resumed_and_opened_in_transformers(shards, tmp_path):
    whole, resumed = whole_and_resumed(settings(shards, tmp_path), tmp_path)
    assert_same(whole, resumed)
    norms = [value for name, value in whole.items() if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(norms) == 4 and all(norm.shape == (22,) and bool((norm != 1).any()) for norm in norms)

    ours, tokenizer = load(tmp_path / "whole" / "model")
    assert isinstance(ours, Qwen3) and ours.config == replace(SHAPE, vocab_size=tokenizer.vocab_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").eval()
    assert isinstance(theirs, transformers.Qwen3ForCausalLM)
    ids = tokenizer.encode("def f(x): return x")
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-4)

    assert not fits(ours, 64)
    (answer,) = generate(ours, tokenizer, [ids], SamplingConfig(temperature=0.0), 11, stop_ids=())
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=11, do_sample=False, eos_token_id=None)
    assert answer.ids == expected[0, len(ids) :].tolist()
