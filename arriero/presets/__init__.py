"""Named configurations: plain functions that return one, to copy (`arriero cp`), run, or change in Python.

A module has those of some recipes. Where a preset follows a published setting, its docstring names the source.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from arriero import settings
from arriero.errors import ConfigError, did_you_mean
from arriero.io.paths import as_path, expand, lies_here
from arriero.presets import curation, own_answers, preferences, pretraining, supervised
from arriero.train.recipes import RECIPES as TRAINING


class _Recipes(Mapping[str, type]):
    """Each recipe's name and its class; that of curation is loaded when asked for, since its rules need numpy."""

    def __getitem__(self, name: str) -> type:
        if name != "curate":
            return TRAINING[name]
        from arriero.curate.config import CurateConfig

        return CurateConfig

    def __iter__(self) -> Iterator[str]:
        return iter([*TRAINING, "curate"])

    def __len__(self) -> int:
        return len(TRAINING) + 1


RECIPES: Mapping[str, type] = _Recipes()

PRESETS: dict[str, Callable[[], Any]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        supervised.sft_docstrings_demo,
        own_answers.rejection_demo,
        own_answers.rejection_llama2,
        supervised.lora_1b,
        supervised.lora_8b,
        supervised.lora_70b,
        supervised.full_1b,
        supervised.full_8b,
        supervised.full_llama2_7b,
        own_answers.grpo_demo,
        own_answers.grpo_paper,
        own_answers.dapo,
        own_answers.dr_grpo,
        own_answers.gspo,
        own_answers.ppo_llama2,
        preferences.dpo_llama3_8b,
        preferences.dpo_tulu3_8b,
        preferences.reward_llama2_7b,
        preferences.reward_llama3_8b,
        curation.curate_web,
        curation.curate_prose,
        curation.curate_code,
        pretraining.pretrain_1m,
        pretraining.pretrain_10m,
        pretraining.pretrain_30m,
        pretraining.pretrain_qwen3_30m,
        pretraining.pretrain_124m,
        pretraining.pretrain_350m,
        pretraining.pretrain_1b,
        pretraining.pretrain_llama1_7b,
        pretraining.pretrain_llama1_13b,
        pretraining.pretrain_llama1_33b,
        pretraining.pretrain_llama1_65b,
        pretraining.pretrain_llama2_7b,
        pretraining.pretrain_llama2_13b,
        pretraining.pretrain_llama2_70b,
        pretraining.pretrain_llama3_8b,
        pretraining.pretrain_llama3_70b,
        pretraining.pretrain_llama3_405b,
        pretraining.pretrain_llama3_2_1b,
        pretraining.pretrain_llama3_2_3b,
        pretraining.pretrain_long_30m,
        pretraining.pretrain_long_llama2_7b,
    )
}


def get(name: str) -> tuple[str, Any]:
    """The recipe's name and the configuration of a preset; raises `ConfigError` with near names."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}{did_you_mean(name, PRESETS)} (arriero ls presets lists them)")
    config = PRESETS[name]()
    recipe = next(recipe for recipe, cls in RECIPES.items() if cls is type(config))
    return recipe, config


def is_settings(word: str) -> bool:
    """Whether a word of a command line names settings rather than a model: a preset, or a TOML file.

    A directory of that name is a model.
    """
    if os.path.isdir(expand(word)):
        return word in PRESETS and not lies_here(word, "the preset")
    return word in PRESETS or word.endswith(".toml")


def load(name: str) -> tuple[str, Any]:
    """The recipe's name and the configuration of a preset or of a TOML file; raises `ConfigError`.

    A file of a preset's name is the file; a directory can be no settings.
    """
    path = as_path(name)
    if path.suffix in (".toml", ".json") or path.is_file():
        return settings.load_recipe(RECIPES, path)
    return get(name)


def without_absent_data(config: Any) -> Any:
    """The configuration of a preset that trains, without the data that it would read where they are not here."""
    if Path(config.data.train).exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=""))


def summary(name: str) -> str:
    """One line on what a preset is for."""
    return (inspect.getdoc(PRESETS[name]) or "").splitlines()[0]
