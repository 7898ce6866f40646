"""Checkpoints with rows for new ids: old logits stay, new rows are means, transformers opens the directory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.tokenizers import python_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from arriero import cli
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, load_model, open_weights
from arriero.checkpoint.resize import resize, resized
from arriero.checkpoint.weights import from_model
from arriero.errors import CheckpointError
from arriero.model.catalogue import PUBLISHED
from arriero.model.llama import Llama
from arriero.tokenizer.extend import extend
from arriero.tokenizer.train import learn_llama3

N_IDS, N_NEW = 503, 89


@pytest.fixture(scope="module")
def base():
    return learn_llama3([python_source("argparse").encode()], N_IDS, n_special=11)


@pytest.fixture(scope="module")
def extension(base):
    return extend(base, [python_source("inspect")], N_NEW)


def model(tied: bool, n_rows: int = N_IDS) -> Llama:
    config = replace(
        PUBLISHED["llama3.2-1b"], dim=48, n_heads=6, n_kv_heads=3, head_dim=8, n_layers=2, ffn_dim=107,
        vocab_size=n_rows, tied_embeddings=tied,
    )  # fmt: skip
    return Llama(config).init_weights(std=0.15, seed=5)


@pytest.mark.parametrize("tied", [True, False])
def test_texts_without_new_tokens_have_equal_logits_in_transformers(base, extension, tied, tmp_path):
    save_hf(model(tied), tmp_path / "old", base, dtype=torch.float32)
    resize(tmp_path / "old", tmp_path / "new", base, extension)
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old").eval()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    ids = torch.randint(N_IDS, (3, 29), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before, after = old(ids).logits, new(ids).logits
    assert after.shape[-1] == N_IDS + N_NEW and new.config.tie_word_embeddings is tied
    assert torch.equal(after[..., :N_IDS], before)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer("def __init__(self):", add_special_tokens=False)["input_ids"] == extension.tokenizer.encode(
        "def __init__(self):"
    )
    assert new.config.eos_token_id == sorted(extension.tokenizer.stop_ids)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_means_of_their_parts(base, extension, tied, dtype, tmp_path):
    save_hf(model(tied), tmp_path / "old", base, dtype=dtype)
    resize(tmp_path / "old", tmp_path / "new", base, extension)
    old, new = load_model(tmp_path / "old"), load_model(tmp_path / "new")
    pairs = [(m.model.embed_tokens.weight, m.lm_head.weight) for m in (old, new)]
    for matrix, grown in zip(*pairs, strict=True):
        assert grown.dtype == dtype and torch.equal(grown[:N_IDS], matrix)
        for i, ids in extension.parts.items():
            expected = torch.stack([matrix[k].float() for k in ids]).sum(0) / len(ids)
            assert torch.allclose(grown[i].float(), expected, atol=1e-6 if dtype == torch.float32 else 4e-3)
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == tied
    others = {n: p for n, p in new.state_dict().items() if "embed" not in n and "head" not in n}
    assert all(torch.equal(p, old.state_dict()[n]) for n, p in others.items())


def test_padding_rows_of_a_checkpoint_are_used_for_new_ids(extension):
    padded = from_model(model(True, n_rows=N_IDS + 31))
    assert resized(padded, N_IDS, extension.parts).config.vocab_size == N_IDS + N_NEW
    wide = from_model(model(False, n_rows=N_IDS + N_NEW + 7))
    grown = resized(wide, N_IDS, extension.parts)
    rows = grown.read("lm_head.weight")
    assert grown.config.vocab_size == N_IDS + N_NEW + 7 == len(rows)
    assert torch.equal(rows[-7:], wide.read("lm_head.weight")[-7:])
    i, ids = next(iter(extension.parts.items()))
    assert torch.allclose(rows[i], wide.read("lm_head.weight")[ids].mean(0), atol=1e-6)


def test_a_checkpoint_with_too_few_rows_is_refused(extension):
    with pytest.raises(CheckpointError, match=r"the model has 499 embeddings, the tokenizer 503 ids; extend"):
        resized(from_model(model(True, n_rows=499)), N_IDS, extension.parts)


def test_the_command_grows_tokenizer_and_checkpoint(base, tmp_path, capsys):
    save_hf(model(True), tmp_path / "old", base, dtype=torch.float32)
    (tmp_path / "old" / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    (tmp_path / "text.txt").write_text(python_source("inspect"))
    source, args = str(tmp_path / "old"), ["tokenizer", "extend", str(tmp_path / "old"), str(tmp_path / "text.txt")]
    assert cli.main([*args, "--vocab-size", "550", "--model", source, "--out", str(tmp_path / "new")]) == 0
    assert "503 ids became 550" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text())["temperature"] == 0.7
    grown, tokenizer = load(tmp_path / "new")
    assert tokenizer.vocab_size == grown.config.vocab_size == 550
    assert cli.main([*args, "--add", "17", "--out", str(tmp_path / "alone")]) == 0
    assert not (tmp_path / "alone" / "config.json").exists() and open_weights(tmp_path / "new").config.vocab_size == 550
    capsys.readouterr()
    for wrong, text in {
        ("--add", "3", "--vocab-size", "700"): "give either --add",
        ("--vocab-size", "503"): "the base has 503 ids already",
        ("--add", "0"): "--add 0: give a positive number of tokens",
        ("--add", "3", "--model", "nowhere"): "no model 'nowhere'",
        ("--add", "3", "--model", "smollm2-135m"): "smollm2-135m has its own tokenizer (49,152 ids), and the one to",
        ("--add", "99999"): "new tokens that occur at least twice, 99,999 are asked for",
    }.items():
        assert cli.main([*args, *wrong, "--out", str(tmp_path / "x")]) == 2
        assert text in capsys.readouterr().err
    assert cli.main([*args, "--add", "3", "--model", source, "--out", source, "--force"]) == 2
    assert "source and destination are the same" in capsys.readouterr().err
