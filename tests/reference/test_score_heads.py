"""Reward models as Hugging Face has them: a model for sequence classification with one label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.toys import toy_config

from arriero.checkpoint.convert import convert
from arriero.checkpoint.export import export_hf
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load_model
from arriero.distributed.engine import Engine
from arriero.errors import CheckpointError
from arriero.model.build import build_model
from arriero.model.config import Qwen3Config
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state, merged_copy
from arriero.model.lora_config import LoraConfig

TOKENS = torch.randint(0, 211, (1, 13), generator=torch.Generator().manual_seed(0))
QWEN3 = Qwen3Config(44, 3, 11, 11, 107, 211, 256, tied_embeddings=True)


def scorer(family: str) -> Llama:
    shape = QWEN3 if family == "qwen3" else toy_config(family)
    return build_model(shape, "score").init_weights(std=0.2, seed=1).eval()


@pytest.mark.parametrize("family", ["llama3-8b", "smollm2-135m", "qwen3"])
@torch.no_grad()
def test_transformers_opens_it_and_gives_equal_scores(family, tmp_path):
    model = scorer(family)
    save_hf(model, tmp_path / "scorer")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    assert theirs.config.num_labels == 1
    for length in (1, 7, 13):
        score = model(TOKENS[:, :length])[0, -1]
        torch.testing.assert_close(score, theirs(TOKENS[:, :length]).logits[0], atol=5e-5, rtol=1e-5)
    again = load_model(tmp_path / "scorer", head="score")
    torch.testing.assert_close(again(TOKENS), model(TOKENS), atol=0, rtol=0)


@torch.no_grad()
def test_one_that_transformers_wrote_is_read(tmp_path):
    shape = toy_config("llama3-8b")
    config = transformers.LlamaConfig(**shape.to_hf("float32"), num_labels=1)
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", head="score")
    torch.testing.assert_close(ours(TOKENS)[0, -1], theirs(TOKENS).logits[0], atol=5e-5, rtol=1e-5)


@torch.no_grad()
def test_one_with_an_adapter_is_exported_with_it_folded_in(tmp_path):
    model = add_lora(scorer("llama3-8b"), LoraConfig(rank=3))
    for p in lora_state(model).values():
        p.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    export_hf(Engine.alone(model), tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    score = merged_copy(model)(TOKENS)[0, -1]
    torch.testing.assert_close(score, theirs(TOKENS).logits[0], atol=5e-5, rtol=1e-5)


def test_a_head_of_another_kind_than_needed_is_refused(tmp_path):
    save_hf(scorer("llama3-8b"), tmp_path / "scorer")
    with pytest.raises(
        CheckpointError, match=r"scorer: its head scores a text, and a model is needed that predicts the"
    ):
        load_model(tmp_path / "scorer")
    with pytest.raises(CheckpointError, match="its head scores a text"):
        convert(tmp_path / "scorer", tmp_path / "out.gguf", to="gguf")
    save_hf(build_model(toy_config("llama3-8b")), tmp_path / "lm")
    with pytest.raises(CheckpointError, match="its head predicts the next token, and a model is needed that scores"):
        load_model(tmp_path / "lm", head="score")


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path):
    save_hf(scorer("llama3-8b"), tmp_path / "scorer")
    file = tmp_path / "scorer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_labels": 3, "id2label": {"0": "a"}}))
    with pytest.raises(CheckpointError, match="a classifier of 3 labels; read are those of one"):
        load_model(tmp_path / "scorer", head="score")
