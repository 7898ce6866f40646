"""RoPE scaling for texts longer than those of the first training: four kinds, as config.json has them.

Each kind has the name that transformers gives it (`rope_type`) and writes its entries of `rope_scaling`; `read_scaling`
reads them. rope.py computes the tables. Anything else (longrope, a rotation of part of a head) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from arriero.errors import CheckpointError, ConfigError
from arriero.io.fields import Fields, shown
from arriero.show.terminal import warn_once


@dataclass(frozen=True)
class RopeScaling:
    """What every kind has: the factor by which (some) wavelengths grow."""

    rope_type: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()  # entries of config.json beside rope_type and factor

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ConfigError(f"model: the factor of RoPE scaling is {self.factor}; it must be above 0")

    def to_hf(self) -> dict[str, Any]:
        """The entries of `rope_scaling`."""
        return {"rope_type": self.rope_type, "factor": self.factor}


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    rope_type: ClassVar[str] = "linear"


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Dynamic NTK: plain RoPE up to max_context; beyond, theta would grow with the length of the text.

    That turns the keys of all earlier tokens anew with every token, which neither a cache nor packed documents can do
    (transformers leaves the old keys as they are); so here nothing goes beyond max_context: see `check_length`.
    """

    rope_type: ClassVar[str] = "dynamic"


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv 2309.00071, section 3.2): high frequencies are kept, low ones divided by `factor`.

    Between the frequencies that turn `beta_fast` and `beta_slow` times within the original context the share of each
    is linear in the index of the frequency; `truncate` rounds the two ends outwards to whole indices. Sines and cosines
    are multiplied by `attention_factor` (section 3.3): 0.1 ln(factor) + 1, if none is given.
    """

    rope_type: ClassVar[str] = "yarn"
    own: ClassVar[tuple[str, ...]] = (
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale",
        "mscale_all_dim",
    )  # fmt: skip

    original_context: int
    attention_factor: float = math.nan
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.attention_factor):
            object.__setattr__(self, "attention_factor", yarn_attention(self.factor))
        if not (0 < self.attention_factor < math.inf and 0 < self.beta_slow <= self.beta_fast < math.inf):
            raise ConfigError(
                f"model: YaRN has attention_factor {self.attention_factor}, beta_fast {self.beta_fast}, beta_slow "
                f"{self.beta_slow}; all must be above 0, and beta_fast not below beta_slow"
            )

    def to_hf(self) -> dict[str, Any]:
        out = {
            **super().to_hf(),
            "original_max_position_embeddings": self.original_context,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        if self.attention_factor != yarn_attention(self.factor):
            out["attention_factor"] = self.attention_factor
        return out if self.truncate else out | {"truncate": False}


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's frequency scaling: long wavelengths are stretched by `factor`, short ones kept.

    With wavelength w = 2*pi/f and L = original_context: w < L/high keeps f, w > L/low uses f/factor, and
    between the two f is interpolated linearly in L/w.
    """

    rope_type: ClassVar[str] = "llama3"
    own: ClassVar[tuple[str, ...]] = (
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    )  # fmt: skip

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ConfigError(
                f"model: Llama 3's RoPE scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the first must be above 0 and below the second"
            )

    def to_hf(self) -> dict[str, Any]:
        return {
            **super().to_hf(),
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_context,
        }


SCALINGS: dict[str, type[RopeScaling]] = {
    kind.rope_type: kind for kind in (LinearScaling, DynamicScaling, YarnScaling, Llama3Scaling)
}


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor for sines and cosines (arXiv 2309.00071, eq. 22), as `mscale` weighs it."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_scaling(config: Fields, context: int) -> tuple[float, RopeScaling | None]:
    """RoPE's theta and scaling from config.json, in the old form and in the new, as transformers reads them.

    `rope_scaling` goes before `rope_parameters`, theta in either before the one beside them, and
    `original_max_position_embeddings` beside them before the one within; what is passed over and differs is named.
    Raises CheckpointError for kinds that rope.py does not compute.
    """
    rope = _chosen(config)
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    if "rope_theta" in rope and theta != config.number("rope_theta", theta):
        config.disagree(f"rope_theta is {config['rope_theta']}, within {rope.name} {theta:g}", "the second is used")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        config.disagree(f"{rope.name} has rope_type {shown(kind)} and type {shown(rope['type'])}", "the first is used")
    if kind not in ("default", *SCALINGS):
        raise CheckpointError(
            f"{config.file}: RoPE type {shown(kind)}; computed here are 'default', {', '.join(map(repr, SCALINGS))}: "
            "take another model, or this one's own software"
        )
    scaling = None if kind == "default" else _READERS[SCALINGS[kind]](rope, config, context)
    _check_rest(rope, () if scaling is None else ("factor", *scaling.own))
    return theta, scaling


def _chosen(config: Fields) -> Fields:
    """The entries that transformers takes: `rope_scaling`'s where it is not empty, else `rope_parameters`'."""
    old, new = (config.group(name) for name in ("rope_scaling", "rope_parameters"))
    if old and new and {**old, "type": None, "rope_type": old.get("rope_type", old.get("type"))} != {
        **new, "type": None, "rope_type": new.get("rope_type", new.get("type"))
    }:  # fmt: skip
        config.disagree(f"rope_scaling is {shown(dict(old))}, rope_parameters {shown(dict(new))}", "the first is used")
    return old or new


def _original_context(rope: Fields, config: Fields, context: int) -> int:
    within = rope.whole("original_max_position_embeddings", context)
    beside = config.whole("original_max_position_embeddings", within)
    if "original_max_position_embeddings" in rope and beside != within:
        config.disagree(
            f"original_max_position_embeddings is {beside}, within {rope.name} {within}", "the first is used"
        )
    return beside


def _yarn(rope: Fields, config: Fields, context: int) -> YarnScaling:
    original = _original_context(rope, config, context)
    ratio = context / original
    factor = rope.number("factor", ratio)  # null: the ratio of the contexts
    if ratio not in (1, factor):
        config.disagree(
            f"{rope.name} has factor {factor:g}, max_position_embeddings {context} is {ratio:g} times "
            f"original_max_position_embeddings {original}",
            "the factor is used",
        )
    mscale, of_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    weighted = yarn_attention(factor, mscale) / yarn_attention(factor, of_all) if mscale and of_all else math.nan
    return YarnScaling(
        factor,
        original,
        rope.number("attention_factor", weighted),
        rope.number("beta_fast", 0.0) or 32.0,
        rope.number("beta_slow", 0.0) or 1.0,
        rope.flag("truncate", True),
    )


_READERS = {
    LinearScaling: lambda rope, config, context: LinearScaling(rope.number("factor")),
    DynamicScaling: lambda rope, config, context: DynamicScaling(rope.number("factor")),
    YarnScaling: _yarn,
    Llama3Scaling: lambda rope, config, context: Llama3Scaling(
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        _original_context(rope, config, context),
    ),
}


def _check_rest(rope: Fields, own: tuple[str, ...]) -> None:
    """Refuse what would change the rotation, and name what else is not read."""
    unknown = [name for name in rope if name not in ("rope_type", "type", "rope_theta", *own)]
    for name in unknown:
        if isinstance(rope[name], Mapping | list) or (name == "partial_rotary_factor" and rope[name] != 1):
            raise CheckpointError(
                f"{rope.file}: {rope.name} has {name} {shown(rope[name])}, a rotation that is not computed here: "
                "take another model, or this one's own software"
            )
    if unknown:
        warn_once(f"{rope.file}: not used for this {rope.name}, as in transformers: {', '.join(unknown)}")
