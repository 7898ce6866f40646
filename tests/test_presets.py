"""Presets are what they say they are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from arriero import cli, presets, settings
from arriero.errors import ConfigError
from arriero.model.catalogue import LADDER, SHAPES
from arriero.train.config import PretrainConfig
from arriero.train.phases import Phase, count_steps, durations, timetable, tokens_of


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


# -- pretraining -------------------------------------------------------------------------------------------------

PRETRAINING = [name for name in presets.PRESETS if isinstance(presets.PRESETS[name](), PretrainConfig)]


def phases_of(name: str) -> tuple[PretrainConfig, list[Phase], int]:
    config = presets.get(name)[1]
    steps = count_steps(config, held_tokens=0)
    return config, timetable(config, {}, steps), steps


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_presets_round_trip_through_toml_and_their_steps_make_their_tokens(
    name: str, tmp_path: Path
) -> None:
    config, phases, steps = phases_of(name)
    file = tmp_path / "preset.toml"
    assert cli.main(["cp", name, str(file)]) == 0
    assert settings.load_recipe(presets.RECIPES, file) == ("pretrain", config)
    assert tokens_of(phases, steps) == pytest.approx(config.tokens, rel=1e-3)
    assert config.model in SHAPES or config.rope_theta  # a shape, or a model that goes on at a longer context


@pytest.mark.parametrize(
    ("name", "model", "tokens", "lr", "seq_len"),
    [
        ("llama1-7b", "llama1-7b", 1.0e12, 3e-4, 2048),
        ("llama1-13b", "llama1-13b", 1.0e12, 3e-4, 2048),
        ("llama1-33b", "llama1-33b", 1.4e12, 1.5e-4, 2048),
        ("llama1-65b", "llama1-65b", 1.4e12, 1.5e-4, 2048),
        ("llama2-7b", "llama2-7b", 2.0e12, 3e-4, 4096),
        ("llama2-13b", "llama2-13b", 2.0e12, 3e-4, 4096),
        ("llama2-70b", "llama2-70b", 2.0e12, 1.5e-4, 4096),
        ("llama3-8b", "llama3-8b", 15e12, 3e-4, 4096),
        ("llama3-70b", "llama3-70b", 15e12, 1.5e-4, 4096),
        ("llama3-405b", "llama3.1-405b", 15.6e12, 8e-5, 4096),
        ("llama3-2-1b", "llama3.2-1b", 9e12, 3e-4, 4096),
        ("llama3-2-3b", "llama3.2-3b", 9e12, 3e-4, 4096),
    ],
)
def test_published_runs_begin_with_4m_tokens_a_batch_and_see_their_published_tokens(
    name: str, model: str, tokens: float, lr: float, seq_len: int
) -> None:
    config, phases, steps = phases_of(f"pretrain-{name}")
    assert (config.model, config.optim.lr, config.data.seq_len) == (model, lr, seq_len)
    assert phases[0].tokens_a_step == 4 * 2**20
    assert sum(n * p.tokens_a_step for n, p in zip(durations(phases, steps), phases, strict=True)) == pytest.approx(
        tokens, rel=1e-3
    )
    o = config.optim
    assert (o.optimizer, o.schedule, o.betas, o.weight_decay, o.clip) == ("adamw", "cosine", (0.9, 0.95), 0.1, 1.0)
    llama3 = name.startswith("llama3")
    assert (o.warmup, o.min_lr) == ((8000, 0.01) if llama3 else (2000, 0.1))
    assert config.data.packing == ("best-fit" if llama3 else "concat")  # Llama 3's attention stays within documents


def test_the_longer_contexts_keep_tokens_a_batch_and_go_on_at_a_lower_rate() -> None:
    long, phases, _ = phases_of("pretrain-long-llama2-7b")
    assert (long.rope_theta, long.data.seq_len, long.tokens, long.optim.lr) == (5e5, 32_768, 400e9, 2e-5)
    assert phases[0].tokens_a_step == 4 * 2**20 and long.optim.warmup == 2000
    (_, base), (_, long) = (presets.get(f"pretrain-{name}") for name in ("30m", "long-30m"))
    assert long.data.seq_len == 4 * base.data.seq_len and long.rope_theta == 1e5
    assert long.loop.batch_rows * long.data.seq_len == base.loop.batch_rows * base.data.seq_len
    assert long.optim.lr == base.optim.lr / 5 and long.model == base.out + "/model"


def test_llama_1_has_its_mixture_and_llama_2_its_epsilon() -> None:
    assert presets.get("pretrain-llama1-65b")[1].data.weights == {
        "commoncrawl": 67, "c4": 15, "github": 4.5, "wikipedia": 4.5, "books": 4.5, "arxiv": 2.5, "stackexchange": 2,
    }  # fmt: skip
    assert presets.get("pretrain-llama2-7b")[1].optim.eps == 1e-5


def test_llama_3s_batch_doubles_after_252m_tokens_and_again_after_2_87_trillion() -> None:
    config, phases, steps = phases_of("pretrain-llama3-405b")
    assert [(p.tokens_a_step // 2**20, p.seq_len) for p in phases] == [(4, 4096), (8, 8192), (16, 8192)]
    seen = list(
        itertools.accumulate(n * p.tokens_a_step for n, p in zip(durations(phases, steps), phases, strict=True))
    )
    assert seen == [pytest.approx(252e6, rel=0.01), pytest.approx(2.87e12, rel=1e-3), pytest.approx(15.6e12, rel=1e-3)]
    assert config.optim.lr * config.optim.min_lr == pytest.approx(8e-7)
    assert steps == pytest.approx(1.2e6, rel=0.1)  # the published length of its cosine


def test_the_ladder_has_twenty_tokens_a_parameter_and_rates_that_fall_as_batches_grow() -> None:
    ladder = [presets.get(f"pretrain-{name}")[1] for name in LADDER]
    for config in ladder:
        assert config.tokens / LADDER[config.model].n_params == pytest.approx(20, rel=0.05)
        assert config.data.seq_len <= LADDER[config.model].max_context
    rates = [config.optim.lr for config in ladder]
    batches = [config.loop.batch_rows * config.data.seq_len for config in ladder]
    assert rates == sorted(rates, reverse=True) and rates[0] < 6e-3 and rates[-1] == pytest.approx(1e-3, rel=0.1)
    assert batches == sorted(batches) and batches[0] == 2**14 and batches[-1] == 2**20
