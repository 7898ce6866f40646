"""Learning-rate schedules as pure functions of the step, so that they have no state to save."""

from __future__ import annotations

import math
from typing import Literal

LrSchedule = Literal["cosine", "linear", "wsd", "constant"]


def lr_factor(step: int, total: int, schedule: LrSchedule, warmup: float, min_lr: float, decay: float = 0.2) -> float:
    """The share of the peak rate at `step` (0-based) of `total`.

    Warmup: (step + 1) / w over the first w = `warmup_steps` steps. Then with p the share of the rest that is done, and
    m = min_lr: cosine m + (1-m)(1 + cos(pi p))/2 (arXiv 1608.03983); linear 1 - (1-m)p; constant 1; wsd (arXiv
    2404.06395) 1 until the last `decay` share of all steps, then linear to m.
    """
    warm = warmup_steps(warmup, total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        decay_steps = min(share_of_steps(decay, total), total - warm)
        done = (step - (total - decay_steps)) / max(decay_steps - 1, 1)
        return 1 - (1 - min_lr) * min(max(done, 0.0), 1.0)
    done = min((step - warm) / max(total - warm - 1, 1), 1.0)
    if schedule == "linear":
        return 1 - (1 - min_lr) * done
    return min_lr + (1 - min_lr) * (1 + math.cos(math.pi * done)) / 2


def warmup_steps(warmup: float, total: int) -> int:
    """Steps over which the rate rises, of `total`; from 1 on, `warmup` is their number."""
    return int(warmup) if warmup >= 1 else share_of_steps(warmup, total)


def share_of_steps(share: float, total: int) -> int:
    """ceil(share * total), where 0.07 * 100 is 7 and not what floats make of it."""
    return math.ceil(round(share * total, 6))
