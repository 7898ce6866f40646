"""A trained reward model in transformers: equal scores, alone and padded on either side."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from helpers.subjects import byte_level
from helpers.toys import toy_config

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.scorer import padding_apart
from arriero.infer.score import open_reward_model
from arriero.model.build import build_model
from arriero.tokenizer.load import load_tokenizer
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.preference_config import PreferenceDataConfig, RewardConfig
from arriero.train.reward import main


@pytest.fixture
def toy(tmp_path):
    """A toy whose tokenizer pads with the token that ends an answer, as many do, and has one more special token."""
    from tokenizers import AddedToken

    tokenizer = byte_level()
    tokenizer.backend.add_special_tokens([AddedToken("<|spare|>", special=True, normalized=False)])
    tokenizer.save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    shape = replace(toy_config("smollm2-135m"), vocab_size=tokenizer.vocab_size, n_layers=2, max_context=512)
    save_hf(build_model(shape).init_weights(std=0.05, seed=1), tmp_path / "toy", tokenizer)
    assert tokenizer.pad_id in tokenizer.stop_ids
    return tmp_path / "toy"


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "full"])
def test_transformers_gives_equal_scores_padded_on_either_side(method, toy, tmp_path, own_cache):
    rows = [{"prompt": f"{i}?", "chosen": "a " * (i % 3 + 1), "rejected": "b"} for i in range(12)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with torch.enable_grad():
        main(
            RewardConfig(
                model=str(toy),
                out=str(tmp_path / "out"),
                method=method,
                data=PreferenceDataConfig(train=str(path), validation="0", seq_len=128),
                optim=OptimConfig(lr=1e-2),
                loop=LoopConfig(steps=4, batch_rows=2, precision="fp32", compile="off"),
            )
        )
    scorer = open_reward_model(tmp_path / "out" / "model")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id not in scorer.tokenizer.stop_ids
    asked = {"role": "user", "content": "7?"}
    ids = [
        scorer.encode([asked, {"role": "assistant", "content": text}]) for text in ("a", "a a a", "b b b b b", "")[:3]
    ]
    ours = scorer(ids)
    assert ours.std() > 0.01
    for one, score in zip(ids, ours, strict=True):
        torch.testing.assert_close(theirs(torch.tensor([one])).logits[0, 0], score, atol=1e-5, rtol=1e-5)
    longest, pad = max(map(len, ids)), theirs.config.pad_token_id
    for left in (False, True):
        fill = [[pad] * (longest - len(one)) for one in ids]
        padded = torch.tensor([f + one if left else one + f for one, f in zip(ids, fill, strict=True)])
        found = theirs(padded, attention_mask=(padded != pad).long()).logits[:, 0]
        torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert own.pad_token_id == pad


def test_a_tokenizer_that_pads_with_another_token_is_left_as_it_is(smollm2_gguf):
    tokenizer = load_tokenizer(smollm2_gguf)
    apart = padding_apart(tokenizer)
    assert tokenizer.pad_id in tokenizer.stop_ids and apart.pad_id not in tokenizer.stop_ids
    assert padding_apart(apart) is apart and tokenizer.encode("a b") == apart.encode("a b")
