"""What learning from preferences is told: `arriero dpo` and `arriero reward`. No torch here, as in config.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from arriero.errors import check
from arriero.io.paths import PathText
from arriero.train.config import DataConfig, OptimConfig, TuneConfig
from arriero.train.rl_config import RlConfig

Rating = Literal["significantly better", "better", "slightly better", "negligibly better"]
REFERENCE_FREE = ("simpo", "orpo")


@dataclass(frozen=True)
class PreferenceDataConfig(DataConfig):
    """Preferences, and which of them are learned from."""

    answers: Literal["all", "extremes"] = "all"
    """Of a prompt with more than two answers: every pair of them, or the best against the worst."""
    ratings: tuple[Rating, ...] = ()
    """Only rows rated so; empty takes all. Llama 3 took the upper two levels (arXiv 2407.21783, section 4.2.1)."""
    also: PathText = ""
    """Further preferences to mix in, as Llama 2 did for both of its reward models (arXiv 2307.09288, section 3.2.2)."""
    also_share: float = 0.1
    """Share of the training rows, or all there are, that is taken of those."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.also_share < 1, f"also_share is {self.also_share}; it is a share of the rows, in (0, 1)")


@dataclass(frozen=True)
class DpoConfig(TuneConfig):
    """Direct preference optimisation: the model makes better answers more probable than worse ones."""

    out: PathText = "out/dpo"
    """Run directory: config, metrics, checkpoints, report, and the trained adapter or model."""
    loss: Literal["sigmoid", "sigmoid-norm", "ipo", "kto", "simpo", "orpo"] = "sigmoid"
    """DPO (arXiv 2305.18290), plain or of log-probabilities per token (2411.15124); IPO (2310.12036); KTO (2402.01306),
    which needs no pairs; SimPO (2405.14734) and ORPO (2403.07691), which need no reference."""
    beta: float = 0.1
    """How strongly the model is held to its reference; of simpo the scale, of orpo the weight beside the NLL."""
    gamma: float = 1.0
    """Margin of simpo, in units of beta times a log-probability per token."""
    smoothing: float = 0.0
    """Share of the preferences that are taken to be wrong, by the sigmoid losses (conservative DPO)."""
    nll: float = 0.0
    """Weight of the better answers' negative log-likelihood per token (2404.19733); Llama 3 has 0.2, orpo needs 1."""
    mask_format: bool = False
    """Leave the tokens of the chat format out of the preference, not out of the NLL (Llama 3, 2407.21783, 4.1.4)."""
    good_weight: float = 1.0
    """Weight of kto's good answers; good_weight x their number is best 1 to 1.33 times the same of the bad ones."""
    bad_weight: float = 1.0
    """Weight of kto's bad answers."""
    reference: Literal["cached", "switched"] = "cached"
    """Log-probabilities of the model as it begins: computed once for all rows that the run reads, and kept on disk; or
    at each step, by switching a new adapter off."""
    samples: int = 8
    """Validation prompts answered before and after training, for the report; 0 for none."""
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self)
        for name in ("good_weight", "bad_weight"):
            check(0 <= getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}; it must be at least 0")
        check(self.samples >= 0, f"samples is {self.samples}; it must be at least 0")
        check(
            self.loss != "kto" or self.nll == 0,
            f"loss is kto and nll {self.nll}; its answers are not compared, so there is no better one: set nll to 0",
        )
        check(
            self.reference == "cached" or (self.method == "lora" and not self.adapter),
            f"reference is {self.reference}, method {self.method}"
            + (f" and adapter {self.adapter}" if self.adapter else "")
            + "; only a new adapter can be switched off to see the model as it began: take reference cached",
        )


@dataclass(frozen=True)
class OnlineDpoConfig(RlConfig):
    """Direct preference optimisation on the model's own answers: the best of a prompt's against the worst."""

    out: PathText = "out/online-dpo"
    """Run directory: config, metrics, rollouts, checkpoints, report, and the trained adapter or model."""
    loss: Literal["sigmoid", "sigmoid-norm", "ipo", "simpo", "orpo"] = "sigmoid"
    """DPO (arXiv 2305.18290), plain or of log-probabilities per token (2411.15124); IPO (2310.12036); SimPO
    (2405.14734) and ORPO (2403.07691), which need no reference."""
    beta: float = 0.1
    """How strongly the model is held to its reference; of simpo the scale, of orpo the weight beside the NLL."""
    gamma: float = 1.0
    """Margin of simpo, in units of beta times a log-probability per token."""
    smoothing: float = 0.0
    """Share of the preferences that are taken to be wrong, by the sigmoid losses (conservative DPO)."""
    nll: float = 0.0
    """Weight of the better answers' negative log-likelihood per token (2404.19733); Llama 3 has 0.2, orpo needs 1."""
    mask_format: bool = False
    """Leave the tokens of the chat format out of the preference, not out of the NLL (Llama 3, 2407.21783, 4.1.4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self)
        check(
            self.rollout.answers >= 2,
            f"answers is {self.rollout.answers}; a pair is made of the best and the worst of at least 2",
        )
        check(
            not self.rollout.dynamic,
            f"dynamic is {self.rollout.dynamic}; prompts whose answers have one reward are left out here: set it to 0",
        )

    @property
    def learned(self) -> int:
        """Two answers to a prompt: the best and the worst."""
        return 2


def check_loss(config: DpoConfig | OnlineDpoConfig) -> None:
    """Raise `ConfigError` for settings that the loss does not have, or cannot do without."""
    check(0 < config.beta < math.inf, f"beta is {config.beta}; it must be a number above 0 (usual: 0.1)")
    check(0 <= config.smoothing < 0.5, f"smoothing is {config.smoothing}; it is a share of the rows, in [0, 0.5)")
    for name in ("gamma", "nll"):
        check(0 <= getattr(config, name) < math.inf, f"{name} is {getattr(config, name)}; it must be at least 0")
    check(
        config.loss != "orpo" or config.nll > 0,
        "loss is orpo and nll 0; its preference alone has no anchor: set nll to 1, as its paper has it",
    )
    check(
        config.smoothing == 0 or config.loss.startswith("sigmoid"),
        f"smoothing is {config.smoothing} and loss {config.loss}; it belongs to the sigmoid losses: set it to 0",
    )


@dataclass(frozen=True)
class RewardConfig(TuneConfig):
    """Reward models: a score for each answer, learned from which of two is better."""

    out: PathText = "out/reward"
    """Run directory: config, metrics, checkpoints, report, and the model for sequence classification."""
    margin: Literal["none", "small", "large", "given"] = "none"
    """How much higher the better answer's score is to be: by its rating as in Llama 2, small 1 to 0 or large 3 to 0
    (arXiv 2307.09288, table 27); given takes the column margin. Llama 3 has none."""
    safety: float = 0.0
    """Weight of the loss that has the score tell safe answers from unsafe ones (2307.09288, A.3.3; the weight is
    unpublished), where rows say which are."""
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.safety < math.inf, f"safety is {self.safety}; it must be at least 0 (0 leaves it out)")
