"""The recipes that train, by name, each with the class of its settings; the module of the name builds and runs it."""

from __future__ import annotations

from arriero.train.config import DistillConfig, PretrainConfig, SftConfig
from arriero.train.preference_config import DpoConfig, OnlineDpoConfig, RewardConfig
from arriero.train.rejection_config import RejectionConfig
from arriero.train.rl_config import GrpoConfig, OnPolicyDistillConfig, PpoConfig

RECIPES: dict[str, type] = {
    "sft": SftConfig,
    "distill": DistillConfig,
    "on_policy_distill": OnPolicyDistillConfig,
    "dpo": DpoConfig,
    "online_dpo": OnlineDpoConfig,
    "reward": RewardConfig,
    "pretrain": PretrainConfig,
    "rejection": RejectionConfig,
    "grpo": GrpoConfig,
    "ppo": PpoConfig,
}
