"""Commands for settings files: list what there is, copy a preset, run it, validate it."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any, Literal

from arriero import presets, settings
from arriero.cli.train import module_of, start
from arriero.errors import ConfigError
from arriero.show.terminal import notes, say


def ls(what: Literal["models", "presets", "steps", "rewards"]) -> None:
    """List known models with their sizes, presets, the steps of curation, or what answers can be scored by.

    Example:
        arriero ls models
        arriero ls presets
        arriero ls steps
        arriero ls rewards

    Args:
        what: Model shapes with exact parameter counts, named configurations to copy, what curation can do, or rewards.
    """
    if what == "steps":
        from arriero.curate.config import KINDS, CurateConfig

        for name, kinds in KINDS.items():
            first_line = (inspect.getdoc(CurateConfig().step(name)) or "").splitlines()[0]
            print(f"{name:<17}  {'/'.join(kinds):<10}  {first_line}")
        return
    if what == "rewards":
        from arriero.rewards.open import DESCRIPTIONS

        for name, description in DESCRIPTIONS.items():
            print(f"{name:<33} {description}")
        return
    if what == "presets":
        width = max(map(len, presets.PRESETS))
        for name in presets.PRESETS:
            print(f"{name:<{width}}  {presets.summary(name)}")
        return
    from arriero.model.catalogue import SHAPES

    heads = ("parameters", "layers", "width", "heads", "KV", "vocabulary", "context")
    print("{:<16} {:>15} {:>6} {:>6} {:>5} {:>4} {:>10} {:>8}".format("model", *heads))
    for name, c in SHAPES.items():
        shape = f"{c.n_layers:>6} {c.dim:>6} {c.n_heads:>5} {c.n_kv_heads:>4} {c.vocab_size:>10,} {c.max_context:>8,}"
        print(f"{name:<16} {c.n_params:>15,} {shape}")


def cp(preset: str, file: Path, force: bool = False) -> None:
    """Copy a preset to a TOML file, every setting explained, ready to edit.

    Example:
        arriero cp sft-docstrings-demo mine.toml
        arriero run mine.toml --lr 1e-4

    Args:
        preset: A name from `arriero ls presets`.
        file: The file to write.
        force: Overwrite the file.
    """
    recipe, config = presets.get(preset)
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; choose another name, or add --force to overwrite it")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: the directory {file.parent} does not exist; make it first")
    file.write_text(settings.to_toml(config, recipe), encoding="utf-8")
    say(f"{file} written; edit it, then: arriero run {shlex.quote(str(file))}")


def run(recipe: str, config: Any) -> None:
    """Run the recipe that a TOML file configures; flags change single settings.

    Example:
        arriero run mine.toml
        arriero run mine.toml --lr 1e-4 --out out/slower
    """
    start(recipe, config)


def validate(recipe: str, config: Any) -> None:
    """Check everything but the training: settings, model, data, masks, and what the run would be.

    Example:
        arriero validate mine.toml
        arriero validate mine.toml --data other.jsonl
    """
    from arriero.train.claim import begun_with, check_named, refuse_changed

    check_named(config, recipe)
    recorded = begun_with(config, recipe)
    planned = module_of(recipe).build(config, notes())
    refuse_changed(recorded, planned.fingerprints(), f"run {config.out}")
    say(planned.summary())
