"""Settings of training that are refused before anything is loaded."""

import math

import pytest

from arriero.errors import ConfigError
from arriero.train.config import LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig


@pytest.mark.parametrize(
    ("cls", "settings", "text"),
    [
        (OptimConfig, {"lr": math.inf}, "lr is inf; it must be a number above 0"),
        (OptimConfig, {"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\); each is in \[0, 1\)"),
        (OptimConfig, {"eps": math.nan}, "eps is nan; it must be a number above 0"),
        (OptimConfig, {"eps": 0.0}, "eps is 0.0; it must be a number above 0"),
        (OptimConfig, {"weight_decay": math.inf}, "weight_decay is inf; it must be at least 0"),
        (OptimConfig, {"clip": math.inf}, "clip is inf; it must be at least 0"),
        (PretrainDataConfig, {"seq_len": 10**12}, r"seq_len is 1000000000000; it must be from 8 to 16,777,216"),
        (PretrainConfig, {"rope_theta": 0.5}, "rope_theta is 0.5; it must be above 1"),
        (LoopConfig, {"epochs": math.inf}, "epochs is inf; it must be a finite number"),
        (LoopConfig, {"spike": 0.5}, "spike is 0.5; it must be 0, or at least 1"),
        (LoopConfig, {"seed": -1}, "seed is -1; it must be a whole number from 0"),
        (PretrainDataConfig, {"max_epochs": {"web": math.inf}}, "max_epochs: web is inf; it must be a number of at"),
        (PretrainDataConfig, {"weights": {"web": math.nan}}, "weights: web is nan; it must be a number of at least 0"),
        (PretrainConfig, {"tokens": math.inf}, "tokens is inf; it must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings, text):
    with pytest.raises(ConfigError, match=text):
        cls(**settings)
