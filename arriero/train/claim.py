"""Which run may use a run directory: a new one if it is empty, else the run that began there, with the same settings
and data; and one group of processes at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from arriero import settings
from arriero.checkpoint import native
from arriero.distributed.mesh import Mesh
from arriero.distributed.peers import peers_of_this_run
from arriero.errors import ConfigError, DataError, UserError
from arriero.io.files import locked
from arriero.io.reading import read_json
from arriero.train import attempts

# What may differ when a run is resumed, beside `parallel`: how the same steps are made, kept and shown. Where the data
# lie may, since their fingerprints are compared.
FREE = {
    "rounds",
    "resume",
    "out",
    "prompts",
    "samples",
    "data.train",
    "data.validation",
    "data.workers",
    "loop.micro_rows",
    "loop.recompute",
    "loop.compile",
    "loop.trackers",
    "loop.log_every",
    "loop.validate_every",
    "loop.save_every",
    "loop.keep_last",
    "loop.max_skipped",
}


def check_named(config: Any, recipe: str) -> None:
    """Raise `ConfigError` where a run is not told what to train, or on what."""
    if not config.model or not config.data.train:
        missing = "model" if not config.model else "data.train"
        raise ConfigError(f"{missing} is not set; say what to train: arriero {recipe} MODEL --data PATH")
    if not config.out:
        raise ConfigError("out is empty; name a directory for the run")
    if os.path.abspath(config.out) == os.path.abspath(config.model):
        raise ConfigError(
            f"out and model are both {config.model!r}, and a directory of that name is taken for the model; "
            "choose another --out"
        )


@contextmanager
def claimed(config: Any, recipe: str, mesh: Mesh) -> Iterator[dict[str, str] | None]:
    """Hold `config.out` for the processes of `mesh` alone; yields what `begun_with` says of it, on all of them.

    Process 0 looks, and holds the lock; what it refuses, all do.
    """
    run_dir = Path(config.out)
    with ExitStack() as stack:
        recorded, refusal = None, None
        if mesh.rank == 0:
            try:
                busy = ConfigError(f"{run_dir}: another process trains there; wait for it, or choose another --out")
                stack.enter_context(locked(run_dir, busy))
                recorded = begun_with(config, recipe)
            except UserError as error:
                refusal = str(error)
        recorded, refusal = peers_of_this_run(mesh.config.timeout).broadcast("run directory", [recorded, refusal])
        if refusal is not None:
            raise ConfigError(refusal)
        yield recorded


def begun_with(config: Any, recipe: str) -> dict[str, str] | None:
    """The fingerprints of the data of the run in `config.out`, which is to go on; None where a new one is to begin.

    It goes on where that is asked for, and where torchrun restarts its job. Raises `ConfigError` where there is none to
    go on with, and where there is one that should not.
    """
    run_dir = Path(config.out)
    record, data = run_dir / "config.toml", run_dir / "data.json"
    if not record.exists():
        if steps := native.steps(run_dir):
            raise ConfigError(
                f"{run_dir} holds a checkpoint of step {steps[-1]} but no config.toml; put that back to go on with it, "
                "choose another --out, or delete the directory"
            )
        if config.resume:
            raise ConfigError(f"{run_dir} holds no run to resume; leave --resume out to start one")
        return None
    if not config.resume and not attempts.restarted(run_dir):
        raise ConfigError(
            f"{run_dir} holds a run already; add --resume to go on with it, choose another --out, or delete it"
        )
    _refuse_other_settings(config, recipe, record)
    if not data.exists():
        raise ConfigError(
            f"{run_dir} holds a run but no data.json, which says what it learns from; put that back, or begin a new run"
        )
    if not isinstance(recorded := read_json(data).get("fingerprints"), dict):
        raise ConfigError(f"{data}: an earlier version wrote it, without what a resume compares; begin a new run")
    return recorded


def _refuse_other_settings(config: Any, recipe: str, record: Path) -> None:
    cls = type(config)
    _, earlier = settings.load_recipe({recipe: cls}, record)
    now, then = settings.to_dict(config), settings.to_dict(earlier)
    decisive = [p for p in settings.field_paths(cls) if p not in FREE and not p.startswith("parallel.")]
    if now.get("lora", {}).get("dropout"):  # which is drawn for each micro-batch
        decisive.append("loop.micro_rows")
    differing = [p for p in decisive if _at(now, p) != _at(then, p)]
    if differing:
        raise ConfigError(
            f"{record}: this run was started with other settings ({', '.join(differing)}); an exact resume needs "
            f"the same ones: arriero run {record} --resume"
        )


def refuse_changed(recorded: Mapping[str, str] | None, found: Mapping[str, str], run: str) -> None:
    """Raise `DataError` where fingerprints are not those recorded: order and rows would be others.

    Keys say in words what was hashed. recorded: None where a run begins. run: what cannot go on, for the message.
    """
    if recorded is None:
        return
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            raise DataError(f"{run} was begun with {name}, which is not in the data; put it back, or begin a new run")
        if name not in recorded:
            raise DataError(f"{run} was begun without {name}; take it away, or begin a new run")
        if recorded[name] != found[name]:
            raise DataError(
                f"{name} has changed since {run} began (fingerprint {found[name][:16]}..., recorded "
                f"{recorded[name][:16]}...): rows would be others; put it back as it was, or begin a new run"
            )


def _at(values: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values
