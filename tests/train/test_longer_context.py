"""A model that goes on in longer rows with another theta: what its files say, and that others compute the same."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from arriero.checkpoint.convert import convert
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load
from arriero.io.gguf_header import read_metadata
from arriero.model.build import build_model
from arriero.model.catalogue import LADDER
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.tokenizer import load_tokenizer
from arriero.train.config import LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig, TrainingStage
from arriero.train.pretrain import build, main

SETTINGS = dict(optim=OptimConfig(lr=1e-3), loop=LoopConfig(steps=2, batch_rows=2, precision="fp32"), prompts=())
SHAPES = {
    "llama": LlamaConfig(44, 2, 11, 11, 29, 512, 64),
    "qwen3": Qwen3Config(44, 2, 6, 2, 29, 512, 64, head_dim=22),
}


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_and_llama_cpp_see_the_new_theta_and_length(name, shards, tmp_path):
    base = tmp_path / "base"
    save_hf(build_model(SHAPES[name]).init_weights(std=0.1, seed=1), base, load_tokenizer(shards / "tokenizer"))
    main(
        PretrainConfig(
            model=str(base),
            out=str(tmp_path / "long"),
            rope_theta=5e5,
            data=PretrainDataConfig(train=str(shards), seq_len=256, validation_tokens=2000),
            **SETTINGS,
        )
    )
    directory = tmp_path / "long" / "model"
    ours, _ = load(directory)
    assert ours.config == replace(SHAPES[name], max_context=256, rope_theta=5e5)
    written = json.loads((directory / "config.json").read_text())
    assert (written["rope_theta"], written["max_position_embeddings"]) == (5e5, 256)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert theirs.config.rope_parameters["rope_theta"] == 5e5 and theirs.config.max_position_embeddings == 256
    tokens = torch.randint(512, (1, 251), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-4)
    metadata = read_metadata(convert(directory, tmp_path / "m.gguf", to="gguf"))
    assert metadata[f"{name}.rope.freq_base"] == 5e5 and metadata[f"{name}.context_length"] == 256


@pytest.mark.parametrize(("stages", "longest"), [((), 96), ((TrainingStage(0.5, seq_len=160),), 160)])
def test_a_new_model_of_the_ladder_claims_the_context_of_its_longest_row(stages, longest, shards, tmp_path):
    """Evaluations and servers go up to what config.json says, and further than it has been trained a model is lost."""
    data = PretrainDataConfig(train=str(shards), seq_len=96, validation_tokens=2000)
    run = build(PretrainConfig(model="1m", out=str(tmp_path), data=data, stages=stages, **SETTINGS), None)
    assert run.model.config.max_context == longest < LADDER["1m"].max_context
    assert run.model.config.to_hf()["max_position_embeddings"] == longest
