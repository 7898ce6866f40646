"""LoRA adapters in PEFT's layout, read and written: adapter_config.json and adapter_model.safetensors.

peft_config.py interprets the settings; here they are compared with the tensors, and both with the model. A tensor that
the settings do not account for is refused: PEFT would silently ignore it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arriero.checkpoint.files import replaced_directory
from arriero.checkpoint.peft_config import CONFIG, PeftConfig, read_peft_config
from arriero.checkpoint.source import resolve
from arriero.checkpoint.tensor_file import Entry, check_finite, safetensors_entries, tensor_reader, write_safetensors
from arriero.errors import CheckpointError
from arriero.io.files import write_json
from arriero.io.paths import as_path
from arriero.model.linear import Product, named_products
from arriero.model.lora import DEFAULT, add_lora, lora_state
from arriero.model.lora_config import LINEARS, LoraConfig
from arriero.show.terminal import warn_once

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(
    re.escape(PREFIX) + r"(.+)\.lora_([AB])(\.default)?\.weight"
)  # some savers leave PEFT's adapter name in


def save_adapter(
    tensors: Mapping[str, Tensor],
    directory: str | Path,
    lora: LoraConfig,
    base_name: str,
    save_beside: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write an adapter as PEFT does, all or nothing.

    tensors: by name, as `lora_state` gives them. base_name: what the adapter was trained on (path, Hub id or built-in
    name), for `base_model_name_or_path`. save_beside(directory) adds what else belongs to it: the chat template that it
    was trained with.
    """
    if not tensors:
        raise CheckpointError(f"{directory}: the model carries no adapter, so there is none to save")
    entries = {PREFIX + name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with replaced_directory(as_path(directory), replaces=WEIGHTS) as temporary:
        write_safetensors(temporary / WEIGHTS, entries, lambda name: tensors[name.removeprefix(PREFIX)].detach())
        write_json(temporary / CONFIG, _to_peft(lora, base_name))
        save_beside(temporary)


def load_adapter(
    model: nn.Module, directory: str | Path, base: str | Path | None = None, *, name: str = DEFAULT
) -> LoraConfig:
    """Put the adapter of a PEFT directory (or Hub id) on `model`, in place; returns its settings.

    name: what the model calls it, where it carries several; it is the one that acts from now on. base: what the model
    is called, to warn where the adapter names another. Raises what `read_adapter` raises.
    """
    lora, tensors = read_adapter(linears_of(model), directory, base)
    add_lora(model, lora, name=name)
    with torch.no_grad():
        for tensor, parameter in lora_state(model, name).items():
            parameter.copy_(tensors[tensor])
    return lora


def read_adapter(
    linears: Mapping[str, Product], directory: str | Path, base: str | Path | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The settings of an adapter for the linears of a model, and its tensors by name (`lora_state`), fp32.

    Raises `CheckpointError` for adapters that are no plain LoRA, damaged, or made for a model of another shape.
    """
    directory = resolve(directory)
    config = read_peft_config(directory)
    file = _weights_file(directory)
    entries = safetensors_entries(file)
    keys = _keys(file, entries, linears)
    ranks = _ranks(config, file, {name: entries[key].shape for name, key in keys.items()}, linears)
    lora = _settings(config, ranks)
    if base is not None and config.base is not None and not _alike(str(base), config.base):
        warn_once(f"{config.file}: the adapter was trained on {config.base}, and it is put on {base}")
    read = tensor_reader(file)
    return lora, {name: check_finite(file, name, read(key).float()) for name, key in keys.items()}


def linears_of(model: nn.Module) -> dict[str, Product]:
    """The linears that an adapter may act on, by name."""
    return {name: module for name, module in named_products(model) if isinstance(module, Product)}


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


def _weights_file(directory: Path) -> Path:
    file, pickled = directory / WEIGHTS, directory / "adapter_model.bin"
    if file.is_file():
        return file
    if pickled.is_file():
        raise CheckpointError(
            f"{pickled}: the adapter is pickled; that may run code when opened, so it is not read: ask for its "
            "safetensors version, or, where you trust it, load it with PEFT and save_pretrained it anew"
        )
    raise CheckpointError(f"{file}: no such file; an adapter's weights are read from safetensors only")


def _keys(file: Path, entries: Mapping[str, Entry], known: Collection[str]) -> dict[str, str]:
    """Name of a tensor in the adapted model -> its key in the file, of every tensor there."""
    keys: dict[str, str] = {}
    for key in entries:
        match = _KEY.fullmatch(key)
        if match is None or match[1] not in known or match[1].endswith("lm_head"):
            raise CheckpointError(
                f"{file}: tensor {key} adapts none of the linears that LoRA adapts here: {', '.join(LINEARS)}"
            )
        name = f"{match[1]}.lora_{match[2]}.weight"
        if name in keys:
            raise CheckpointError(f"{file}: {key} and {keys[name]} are the same tensor; save the adapter anew")
        keys[name] = key
    if not keys:
        raise CheckpointError(f"{file}: it holds no LoRA tensors")
    for name, key in keys.items():
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in keys:
            raise CheckpointError(f"{file}: {key} is there, but {PREFIX}{other} is missing")
    return keys


def _ranks(
    config: PeftConfig, file: Path, shapes: Mapping[str, tuple[int, ...]], linears: Mapping[str, Product]
) -> dict[str, int]:
    """Full name -> rank of every linear that the adapter acts on; settings, tensors and model have to agree."""
    ranks = {}
    for name, linear in linears.items():
        a, b = shapes.get(f"{name}.lora_A.weight"), shapes.get(f"{name}.lora_B.weight")
        if a is None or b is None:
            continue
        if not config.adapts(name):
            raise CheckpointError(
                f"{file}: it adapts {name}, which the target_modules of {CONFIG} leave out, so PEFT would ignore it; "
                "correct the one or the other"
            )
        rank = ranks[name] = config.rank_of(name)
        if len(a) == 2 and len(b) == 2 and a[0] == b[1] != rank:
            raise CheckpointError(
                f"{config.file}: rank {rank} for {name} (r, rank_pattern), but its tensors in {WEIGHTS} have rank "
                f"{a[0]}; the two files are of different adapters: copy or download both again"
            )
        for half, shape, needed in (("A", a, (rank, linear.in_features)), ("B", b, (linear.out_features, rank))):
            if shape != needed:
                raise CheckpointError(
                    f"{file}: {name}.lora_{half}.weight is {list(shape)}, this model needs {list(needed)}; "
                    f"the adapter was trained on {config.base!r}"
                )
    if missing := [name for name in linears if name not in ranks and config.adapts(name)]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        warn_once(f"{file}: no tensors for {missing[0]}{more}, which {CONFIG} names: left as the model has them")
    return ranks


def _settings(config: PeftConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """PEFT's settings as ours; targets by leaf name where every such linear is adapted, else by full name."""
    short = config.targets if isinstance(config.targets, tuple) and set(config.targets) <= set(LINEARS) else ()
    n_layers = len({name.split(".")[2] for name in ranks})
    everywhere = len(ranks) == n_layers * len(short) and config.layers is None and not config.excluded
    alphas = {name: config.alpha_of(name) for name in ranks}
    return LoraConfig(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=tuple(sorted(short)) if everywhere else tuple(ranks),
        rslora=config.rslora,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config.alpha},
    )


def _alike(name: str, other: str) -> bool:
    """Whether two names (paths, Hub ids) may be one model's: the last part of one is within that of the other."""
    a, b = (re.sub(r"[^a-z0-9]", "", Path(n).name.removesuffix(".gguf").lower()) for n in (name, other))
    return a in b or b in a
