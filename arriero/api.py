"""The Python interface: what `arriero pretrain`, `sft` and `eval` do, with settings as keywords.

Settings are the fields of the configuration, by short name (`lr=1e-4`) or with their section written as
`**{"optim.lr": 1e-4}`. With a complete configuration, call the recipe's own `main(config)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.eval.config import EvalConfig
from arriero.settings import apply_overrides
from arriero.train.config import DataConfig, PretrainConfig, PretrainDataConfig, SftConfig
from arriero.train.preference_config import DpoConfig, OnlineDpoConfig, PreferenceDataConfig, RewardConfig
from arriero.train.rejection_config import RejectionConfig, RejectionDataConfig
from arriero.train.rl_config import GrpoConfig, PpoConfig, PromptConfig

if TYPE_CHECKING:
    from arriero.eval.results import Results
    from arriero.train.loop import Outcome


def sft(model: str | Path, data: str | Path, **settings: Any) -> Outcome:
    """Fine-tune `model` on the conversations in `data`; the adapter or model is left in the run directory `out`.

    settings: fields of `SftConfig` and its sections, such as out, method, lr, epochs, rank, resume.
    Raises a `UserError` before step 1 for whatever cannot be trained on.
    """
    from arriero.train.sft import main

    return main(apply_overrides(SftConfig(model=str(model), data=DataConfig(train=str(data))), settings))


def rejection(model: str | Path, data: str | Path, reward: str, **settings: Any) -> Outcome | None:
    """Fine-tune `model` on the best of its own answers to the prompts in `data`, as `reward` scores them, in rounds.

    settings: fields of `RejectionConfig` and its sections, such as out, rounds, answers, temperatures, lr, resume.
    Raises a `UserError` before anything is sampled for whatever cannot be asked, scored or trained on. Returns None
    where all rounds are done.
    """
    from arriero.train.rejection import main

    config = RejectionConfig(model=str(model), reward=reward, data=RejectionDataConfig(train=str(data)))
    return main(apply_overrides(config, settings))


def grpo(model: str | Path, data: str | Path, reward: str = "", **settings: Any) -> Outcome:
    """Train `model` on its own answers to the prompts in `data`, scored by `reward`, each against its group's.

    reward: "" is exact, or what `environment` gives, where one is among the settings.
    settings: fields of `GrpoConfig` and its sections, such as out, answers, max_new_tokens, advantage, loss, kl, lr.
    Raises a `UserError` before step 1 for whatever cannot be trained on.
    """
    from arriero.train.grpo import main

    config = GrpoConfig(model=str(model), reward=reward, data=PromptConfig(train=str(data)))
    return main(apply_overrides(config, settings))


def ppo(model: str | Path, data: str | Path, reward: str = "", **settings: Any) -> Outcome:
    """Train `model` on its own answers to the prompts in `data`, scored by `reward`, with a value model.

    settings: fields of `PpoConfig` and its sections, such as out, answers, updates, kl, value_lr, gae_lambda, lr.
    Raises a `UserError` before step 1 for whatever cannot be trained on.
    """
    from arriero.train.ppo import main

    config = PpoConfig(model=str(model), reward=reward, data=PromptConfig(train=str(data)))
    return main(apply_overrides(config, settings))


def dpo(model: str | Path, data: str | Path, **settings: Any) -> Outcome:
    """Train `model` on the preferences in `data`; the adapter or model is left in the run directory `out`.

    settings: fields of `DpoConfig` and its sections, such as out, loss, beta, nll, adapter.
    Raises a `UserError` before step 1 for whatever cannot be trained on.
    """
    from arriero.train.dpo import main

    config = DpoConfig(model=str(model), data=PreferenceDataConfig(train=str(data)))
    return main(apply_overrides(config, settings))


def online_dpo(model: str | Path, data: str | Path, reward: str = "exact", **settings: Any) -> Outcome:
    """Train `model` on its own answers to the prompts in `data`, of which `reward` finds the best and the worst.

    settings: fields of `OnlineDpoConfig` and its sections, such as out, answers, max_new_tokens, loss, beta, nll, lr.
    Raises a `UserError` before step 1 for whatever cannot be trained on.
    """
    from arriero.train.online_dpo import main

    config = OnlineDpoConfig(model=str(model), reward=reward, data=PromptConfig(train=str(data)))
    return main(apply_overrides(config, settings))


def reward(model: str | Path, data: str | Path, **settings: Any) -> Outcome:
    """Train `model` to score answers, on the preferences in `data`; leaves `model/` in the run directory `out`.

    settings: fields of `RewardConfig` and its sections, such as out, margin, safety, lr. `open_reward_model` opens it.
    Raises a `UserError` before step 1 for whatever cannot be trained on.
    """
    from arriero.train.reward import main

    config = RewardConfig(model=str(model), data=PreferenceDataConfig(train=str(data)))
    return main(apply_overrides(config, settings))


def pretrain(model: str | Path, data: str | Path, **settings: Any) -> Outcome:
    """Pretrain a shape such as "30m", or go on with a model, on token shards; leaves `model/` in the run directory.

    settings: fields of `PretrainConfig` and its sections, such as out, tokens, lr, seq_len, resume.
    Raises a `UserError` before step 1 for whatever cannot be trained on.
    """
    from arriero.train.pretrain import main

    config = PretrainConfig(model=str(model), data=PretrainDataConfig(train=str(data)))
    return main(apply_overrides(config, settings))


def evaluate(model: str | Path, data: str | Path, **settings: Any) -> Results:
    """Measure `model` on `data`: perplexity of texts, or answers against references.

    settings: fields of `EvalConfig`, such as adapter, compare_with, rows.
    """
    from arriero.eval.run import run_eval

    return run_eval(apply_overrides(EvalConfig(model=str(model), data=str(data)), settings))
