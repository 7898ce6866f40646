"""LoRA adapters in PEFT's layout, both ways: adapter_config.json and adapter_model.safetensors.

Which linears are adapted, and with what rank, is read from the tensors, not from `target_modules`: so a list, a
regular expression, "all-linear", `layers_to_transform` and `exclude_modules` all mean what they meant to PEFT.
What would change the computation in a way LoRA layers here do not (DoRA, biases, whole modules saved along,
initialisations that alter the base weights) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arriero.checkpoint.files import read_json, replaced_directory, write_json
from arriero.checkpoint.source import resolve
from arriero.checkpoint.tensor_file import Entry, safetensors_entries, tensor_reader, write_safetensors
from arriero.errors import CheckpointError
from arriero.model.config import LINEARS, LoraConfig
from arriero.model.lora import add_lora, lora_state

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings of PEFT's LoraConfig under which its computation is not W x + s B A x; each must be absent, null or empty.
_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "use_qalora", "use_bdlora", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "megatron_config", "arrow_config",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")


def save_adapter(model: nn.Module, directory: str | Path, lora: LoraConfig, base_name: str) -> None:
    """Write the adapter in `model` as PEFT does, all or nothing.

    base_name: what the adapter was trained on (path, Hub id or built-in name), for `base_model_name_or_path`.
    """
    state = lora_state(model)
    if not state:
        raise CheckpointError(f"{directory}: the model carries no adapter, so there is none to save")
    entries = {PREFIX + name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    with replaced_directory(Path(directory), replaces=WEIGHTS) as temporary:
        write_safetensors(temporary / WEIGHTS, entries, lambda name: state[name.removeprefix(PREFIX)].detach())
        write_json(temporary / CONFIG, _to_peft(lora, base_name))


def load_adapter(model: nn.Module, directory: str | Path) -> LoraConfig:
    """Wrap `model` with the adapter of a PEFT directory (or Hub id), in place; returns what it adapts and how.

    Raises `CheckpointError` for adapters that are no plain LoRA, damaged, or made for a model of another shape.
    """
    directory = resolve(directory)
    config = read_json(directory / CONFIG)
    _refuse_other_kinds(directory / CONFIG, config)
    file = directory / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; an adapter's weights are read from safetensors only")
    entries = safetensors_entries(file)
    linears = _adapted_linears(file, entries, model)
    lora = _from_peft(config, linears)
    add_lora(model, lora)
    wrapped, read = lora_state(model), tensor_reader(file)
    with torch.no_grad():
        for name, parameter in wrapped.items():
            shape = entries[PREFIX + name].shape
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{file}: {name} is {list(shape)}, this model needs {list(parameter.shape)}; "
                    f"the adapter was trained on {config.get('base_model_name_or_path')!r}"
                )
            parameter.copy_(read(PREFIX + name))
    return lora


def adapter_base(directory: str | Path) -> str:
    """The name of the model that the adapter was trained on."""
    file = resolve(directory) / CONFIG
    base = read_json(file).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{file}: it does not name the model that the adapter was trained on; name the model")
    return str(base)


def _to_peft(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(LINEARS if "all-linear" in lora.targets else lora.targets),
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _refuse_other_kinds(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {config.get('peft_type')!r}; LoRA adapters ('LORA') are read")
    for name in _REFUSED:
        if config.get(name):
            raise CheckpointError(
                f"{file}: {name} is set; Arriero computes plain LoRA only: merge this adapter with PEFT first"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {config['bias']!r}; Llama has no biases, so only 'none' is read")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def _adapted_linears(file: Path, entries: Mapping[str, Entry], model: nn.Module) -> dict[str, int]:
    """Full name -> rank of every linear that the file adapts."""
    known = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ranks: dict[str, int] = {}
    for key, entry in entries.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None or match[1] not in known or match[1].endswith("lm_head"):
            raise CheckpointError(
                f"{file}: tensor {key} adapts none of the linears that LoRA adapts here: {', '.join(LINEARS)}"
            )
        other = key.replace(f".lora_{match[2]}.", ".lora_B." if match[2] == "A" else ".lora_A.")
        if other not in entries:
            raise CheckpointError(f"{file}: {key} is there, but {other} is missing")
        if match[2] == "A":
            ranks[match[1]] = entry.shape[0]
    if not ranks:
        raise CheckpointError(f"{file}: it holds no LoRA tensors")
    return ranks


def _from_peft(config: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig:
    """PEFT's settings as ours; targets by leaf name where every such linear is adapted, else by full name."""
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    patterns = config.get("alpha_pattern") or {}
    alphas = {name: float(patterns[key]) for name in ranks if (key := _pattern_key(patterns, name)) is not None}
    listed = config.get("target_modules")
    targets = tuple(sorted(listed)) if isinstance(listed, list) and set(listed) <= set(LINEARS) else ()
    n_layers = len({name.split(".")[2] for name in ranks})
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=targets if len(ranks) == n_layers * len(targets) and not _partial(config) else tuple(ranks),
        rslora=bool(config.get("use_rslora", False)),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
    )


def _partial(config: Mapping[str, Any]) -> bool:
    return bool(config.get("layers_to_transform") is not None or config.get("exclude_modules"))


def _pattern_key(patterns: Mapping[str, Any], name: str) -> str | None:
    """The first key that matches the end of the module's name, as PEFT matches them."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
