"""Presets are what they say they are."""

from __future__ import annotations

import pytest

from arriero import presets
from arriero.errors import ConfigError


@pytest.mark.parametrize(("name", "rank", "alpha"), [("lora-1b", 64, 128), ("lora-8b", 8, 16), ("lora-70b", 16, 32)])
def test_lora_presets_follow_torchtunes_published_settings(name: str, rank: int, alpha: float) -> None:
    recipe, config = presets.get(name)
    assert (recipe, config.method) == ("sft", "lora")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (rank, alpha, 0.0)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.schedule) == (3e-4, 0.01, "cosine")
    assert (config.loop.micro_rows, config.loop.batch_rows) == (2, 16)
    adapted = {
        name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj") if config.lora.matches(f"x.{name}")
    }
    assert adapted == {"q_proj", "v_proj", "o_proj", "gate_proj"}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_names_a_model_and_data_or_steps_and_says_what_it_is_for(name: str) -> None:
    recipe, config = presets.get(name)
    assert (config.steps and not config.sources) if recipe == "curate" else (config.model and config.data.train)
    assert presets.summary(name).endswith(".")


def test_full_presets_train_every_weight_at_a_tenth_of_the_lora_rate() -> None:
    for name in ("full-1b", "full-8b", "full-llama2-7b"):
        config = presets.get(name)[1]
        assert (config.method, config.optim.lr) == ("full", 2e-5)


def test_an_unknown_preset_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'lora8b'; did you mean 'lora-8b'"):
        presets.get("lora8b")
