"""adapter_config.json, interpreted as PEFT's LoraConfig does: which linears an adapter is on, with what rank and alpha.

Defaults, regular expressions and name matching are PEFT's (`check_target_module_exists`, `get_pattern_key`). Settings
are refused by name where PEFT itself fails on them (a rank of null), where the computation would not be W x + s B A x,
and where the adapter was trained over base weights that PEFT had changed first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import CheckpointError
from arriero.io.reading import read_json
from arriero.show.terminal import warn_once

CONFIG = "adapter_config.json"

# Each must be absent, null, false or empty: with it PEFT does not compute W x + s B A x.
_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "use_qalora", "use_bdlora", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "megatron_config", "arrow_config",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
# Ways to begin that leave W as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ train over another W than the base has.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8.0  # PEFT's defaults
_DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's for Llama and Qwen3
# What only training reads, what only describes, and what is said by the entries above.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "inference_mode", "lora_ga_config", "loftq_config", "megatron_core", "peft_version", "qalora_group_size",
        "revision", "runtime_config", "task_type",
    ]
)  # fmt: skip
_READ = frozenset(
    [
        "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_lora_weights",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA adapter's settings; names are the model's own, such as "model.layers.3.mlp.up_proj".

    targets, excluded: a regular expression for the whole name (a text), or ends of names. layers: the blocks adapted,
    None for all; layers_pattern: what the list of blocks may be called.
    """

    file: Path
    base: str | None
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def rank_of(self, name: str) -> int:
        """The rank of the linear of this full name."""
        return self.rank_pattern.get(self._key(self.rank_pattern, name), self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the linear of this full name."""
        return self.alpha_pattern.get(self._key(self.alpha_pattern, name), self.alpha)

    def adapts(self, name: str) -> bool:
        """Whether PEFT puts an adapter on the linear of this full name (never on the head for "all-linear")."""
        if self.excluded and _names(self.excluded, name):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return not name.endswith("lm_head")
        if not _names(self.targets, name):
            return False
        if self.layers is None or name in self.targets:  # a list is a tuple here, so a whole name is one of its items
            return True
        patterns = self.layers_pattern or ("[^.]*",)
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        return any(match is not None and int(match[1]) in self.layers for match in found)

    @staticmethod
    def _key(patterns: Mapping[str, Any], name: str) -> str:
        """The first pattern that matches the end of the name, or the name itself, which no pattern is."""
        return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), name)


def read_peft_config(directory: Path) -> PeftConfig:
    """Read the settings of the adapter in a directory.

    Raises CheckpointError for adapters that are no plain LoRA, and for entries that PEFT cannot read either.
    """
    file = directory / CONFIG
    config = read_json(file)
    _refuse_other_kinds(file, config)
    unknown = sorted(name for name in config.keys() - _READ - _WITHOUT_EFFECT - set(_REFUSED) if config[name])
    if unknown:
        warn_once(f"{file}: {', '.join(unknown)}: not known to this version of Arriero and not used")
    if config.get("fan_in_fan_out"):
        warn_once(
            f"{file}: fan_in_fan_out is true, but a Llama's linears are stored [out, in]: read as false, as by PEFT"
        )

    def entry(name: str, default: Any, ok: Any, rule: str) -> Any:
        value = config.get(name, default)
        if not ok(value):
            raise CheckpointError(f"{file}: {name} is {value!r}; {rule}: correct it, or save the adapter anew")
        return value

    layers = entry("layers_to_transform", None, _is_layers, "an integer or a list of them is expected")
    return PeftConfig(
        file=file,
        base=config.get("base_model_name_or_path") or None,
        rank=entry("r", _DEFAULT_RANK, _is_rank, "the rank is an integer above 0"),
        alpha=float(entry("lora_alpha", _DEFAULT_ALPHA, _is_number, "alpha is a number")),
        dropout=float(
            entry("lora_dropout", 0.0, lambda v: v is None or _is_share(v), "a share in [0, 1) is expected") or 0
        ),
        rslora=bool(config.get("use_rslora")),
        rank_pattern=entry("rank_pattern", None, _patterns_to(_is_rank), "an object of ranks by pattern") or {},
        alpha_pattern=entry("alpha_pattern", None, _patterns_to(_is_number), "an object of alphas by pattern") or {},
        targets=_matcher(entry("target_modules", None, _is_matcher, "a pattern or a list of names"), _DEFAULT_TARGETS),
        excluded=_matcher(entry("exclude_modules", None, _is_matcher, "a pattern or a list of names"), ()),
        layers=None if layers is None or layers == [] else (layers,) if isinstance(layers, int) else tuple(layers),
        layers_pattern=_several(entry("layers_pattern", None, _is_matcher, "a pattern or a list of them")),
    )


def _refuse_other_kinds(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {config.get('peft_type')!r}; LoRA adapters ('LORA') are read")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{file}: task_type is {config['task_type']!r}: an adapter for a model with another head; only adapters of "
            "language models ('CAUSAL_LM') are read"
        )
    for name in _REFUSED:
        if config.get(name):
            raise CheckpointError(
                f"{file}: {name} is set; Arriero computes plain LoRA only: merge this adapter with PEFT first"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {config['bias']!r}; Llama has no biases, so only 'none' is read")
    start = config.get("init_lora_weights", True)
    if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in _PLAIN_INITS):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which changed the base weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def _names(matcher: str | tuple[str, ...], name: str) -> bool:
    if isinstance(matcher, str):
        return re.fullmatch(matcher, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in matcher)


def _matcher(value: Any, default: tuple[str, ...]) -> str | tuple[str, ...]:
    return default if value is None else value if isinstance(value, str) else tuple(value)


def _several(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max  # a whole number of JSON may lie beyond all floats
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_layers(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(item, int) and not isinstance(item, bool) for item in several)


def _is_matcher(value: Any) -> bool:
    """Whether a value is absent, a list of names, or a regular expression that compiles."""
    if isinstance(value, str):
        return _compiles(value)
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _patterns_to(ok: Any) -> Any:
    """A check that a value is absent, or an object from regular expressions to values that are `ok`."""
    return lambda value: (
        value is None or (isinstance(value, dict) and all(_compiles(key) and ok(item) for key, item in value.items()))
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except re.error:
        return False
    return True
