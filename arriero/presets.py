"""Named configurations: plain functions that return one, to copy (`arriero cp`), run, or change in Python.

Where a preset follows a published setting, its docstring says whose. torchtune counts unpacked examples in a
batch; rows here are packed, so the same number of rows holds more examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from arriero.errors import ConfigError, did_you_mean
from arriero.model.config import LoraConfig
from arriero.train.config import (
    DataConfig,
    LoopConfig,
    OptimConfig,
    PretrainConfig,
    SftConfig,
)

if TYPE_CHECKING:
    from arriero.curate.config import CurateConfig


class _Recipes(Mapping[str, type]):
    """Each recipe's name and its class; that of curation is loaded when asked for, since its rules need numpy."""

    _light: ClassVar[dict[str, type]] = {"sft": SftConfig, "pretrain": PretrainConfig}

    def __getitem__(self, name: str) -> type:
        if name != "curate":
            return self._light[name]
        from arriero.curate.config import CurateConfig

        return CurateConfig

    def __iter__(self) -> Iterator[str]:
        return iter([*self._light, "curate"])

    def __len__(self) -> int:
        return len(self._light) + 1


RECIPES: Mapping[str, type] = _Recipes()

TORCHTUNE_TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sft_docstrings_demo() -> SftConfig:
    """SmolLM2-135M learns to summarise Python functions, on a laptop's CPU; the data is built by `make demo`."""
    return SftConfig(
        model="smollm2-135m",
        out="demo/run",
        samples=4,
        data=DataConfig(train="demo/data/train.jsonl", validation="demo/data/validation.jsonl", seq_len=1024),
        optim=OptimConfig(lr=1e-3),
        loop=LoopConfig(steps=60, batch_rows=2, validate_every=60, save_every=20),
    )


def lora_1b() -> SftConfig:
    """LoRA on Llama 3.2 1B with torchtune's settings: rank 64, alpha 128, 3e-4."""
    return _lora("meta-llama/Llama-3.2-1B-Instruct", rank=64, alpha=128)


def lora_8b() -> SftConfig:
    """LoRA on Llama 3.1 8B with torchtune's settings: rank 8, alpha 16, 3e-4."""
    return _lora("meta-llama/Llama-3.1-8B-Instruct", rank=8, alpha=16)


def lora_70b() -> SftConfig:
    """LoRA on Llama 3.1 70B with torchtune's settings: rank 16, alpha 32, 3e-4."""
    return _lora("meta-llama/Llama-3.1-70B-Instruct", rank=16, alpha=32)


def full_1b() -> SftConfig:
    """Every weight of Llama 3.2 1B at torchtune's 2e-5."""
    return _full("meta-llama/Llama-3.2-1B-Instruct")


def full_8b() -> SftConfig:
    """Every weight of Llama 3.1 8B at torchtune's 2e-5; activations recomputed."""
    return _full("meta-llama/Llama-3.1-8B-Instruct")


def full_llama2_7b() -> SftConfig:
    """Llama 2's own fine-tuning: 2e-5, weight decay 0.1, 64 rows of 4096, two epochs (arXiv 2307.09288, 3.1)."""
    return SftConfig(
        model="meta-llama/Llama-2-7b-hf",
        out="out/full-llama2-7b",
        method="full",
        data=DataConfig(train="train.jsonl", seq_len=4096),
        optim=OptimConfig(lr=2e-5, weight_decay=0.1),
        loop=LoopConfig(epochs=2, batch_rows=64, recompute="full"),
    )


def curate_web() -> CurateConfig:
    """Web pages as FineWeb keeps them (arXiv 2406.17557), with Llama 3's line and URL deduplication."""
    from arriero.curate.config import CurateConfig
    from arriero.curate.rules import C4Rules

    return CurateConfig(
        on_error="skip",
        steps=(
            "normalise", "url-dedup", "exact-dedup", "language", "gopher-repetition", "c4", "gopher-quality", "fineweb",
            "ngram-coverage", "licence", "code", "line-dedup", "near-dedup", "scrub",
        ),
        c4=C4Rules(line_ends=("",)),  # FineWeb took all of C4's rules but that lines must end in punctuation
    )  # fmt: skip


def curate_prose() -> CurateConfig:
    """Books, speeches, manuals: texts that somebody edited. Duplicates, other languages and repetition go."""
    from arriero.curate.config import CurateConfig

    return CurateConfig(
        steps=("normalise", "language", "gopher-repetition", "licence", "code", "exact-dedup", "near-dedup", "scrub"),
    )


def curate_code() -> CurateConfig:
    """Source code as Llama 1 filters it (arXiv 2302.13971, 2.1): licence, line length, alphanumeric share."""
    from arriero.curate.config import CurateConfig

    return CurateConfig(
        steps=("normalise", "licence", "code", "exact-dedup", "near-dedup", "scrub"),
    )


PRESETS: dict[str, Callable[[], Any]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        sft_docstrings_demo,
        lora_1b,
        lora_8b,
        lora_70b,
        full_1b,
        full_8b,
        full_llama2_7b,
        curate_web,
        curate_prose,
        curate_code,
    )
}


def get(name: str) -> tuple[str, Any]:
    """The recipe's name and the configuration of a preset; raises `ConfigError` with near names."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}{did_you_mean(name, PRESETS)} (arriero ls presets lists them)")
    config = PRESETS[name]()
    recipe = next(recipe for recipe, cls in RECIPES.items() if cls is type(config))
    return recipe, config


def summary(name: str) -> str:
    """One line on what a preset is for."""
    return (inspect.getdoc(PRESETS[name]) or "").splitlines()[0]


def _lora(model: str, rank: int, alpha: float) -> SftConfig:
    return SftConfig(
        model=model,
        out="out/lora",
        data=DataConfig(train="train.jsonl"),
        lora=LoraConfig(rank=rank, alpha=alpha, targets=TORCHTUNE_TARGETS),
        optim=OptimConfig(lr=3e-4, weight_decay=0.01),
        loop=LoopConfig(batch_rows=16, micro_rows=2, recompute="full"),
    )


def _full(model: str) -> SftConfig:
    return SftConfig(
        model=model,
        out="out/full",
        method="full",
        data=DataConfig(train="train.jsonl"),
        optim=OptimConfig(lr=2e-5),
        loop=LoopConfig(batch_rows=16, micro_rows=2, recompute="full"),
    )
