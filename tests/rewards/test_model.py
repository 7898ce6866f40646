"""A reward model as a scorer, against the model itself."""

from __future__ import annotations

import pytest
import torch

from arriero.checkpoint.hf import save_hf
from arriero.errors import CheckpointError, ConfigError
from arriero.infer.score import open_reward_model
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.rewards.base import CUT, Answer
from arriero.rewards.open import open_scorer
from arriero.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory, smollm2_gguf):
    tokenizer = load_tokenizer(smollm2_gguf)
    shape = LlamaConfig(22, 2, 11, 11, 29, tokenizer.vocab_size, 64, tied_embeddings=False)
    path = tmp_path_factory.mktemp("rm") / "model"
    save_hf(Llama(shape, head="score").init_weights(seed=3), path, tokenizer)
    return path


def test_scores_are_the_models_own_in_order_and_cut_or_long_answers_get_none(directory):
    asked = [{"role": "user", "content": "Legs?"}]
    answers = [
        Answer("Legs?", "Four."), Answer("Legs?", "Four", finished=False), Answer("Legs?", "four " * 99),
        Answer(asked, "Two."),
    ]  # fmt: skip
    with open_scorer(f"model:{directory}") as scorer:
        found = scorer(answers)
    model = open_reward_model(directory)
    ids = [model.encode([*asked, {"role": "assistant", "content": text}]) for text in ("Four.", "Two.")]
    torch.testing.assert_close(torch.tensor([found[0].value, found[3].value]), model(ids))
    assert found[1] == CUT
    assert found[2].outcome == "crash"
    assert found[2].note.startswith("prompt and answer have")


def test_answers_share_their_prompt_and_not_only_the_template_and_equal_ones_are_read_once(directory, monkeypatch):
    model = open_reward_model(directory)
    template, found = list(range(10, 30)), []
    sequences = [template + [100 + prompt] * 12 + [k % 3, 7] for prompt in range(4) for k in range(6)]
    forward = model.model.model.forward
    monkeypatch.setattr(
        model.model.model, "forward", lambda tokens, layout: found.append(tokens) or forward(tokens, layout)
    )
    scores = model(sequences)
    assert sum(tokens.numel() for tokens in found) == 4 * (32 + 3 * 2)
    torch.testing.assert_close(scores, torch.cat([model([ids]) for ids in sequences]))
    assert (scores[:3] == scores[3:6]).all()


def test_a_model_without_a_head_of_scores_is_refused(smollm2_gguf):
    with pytest.raises(CheckpointError):
        open_scorer(f"model:{smollm2_gguf}")
    with pytest.raises(ConfigError, match="write model:DIR"):
        open_scorer("model:")
