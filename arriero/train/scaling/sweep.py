"""The isoFLOP sweep: for each budget of compute, models of several sizes trained until it is spent.

Each is a run of `arriero pretrain` with a schedule of its own that ends with its budget (Chinchilla, arXiv 2203.15556,
section 3.2: a loss in the middle of a longer run is too high). All read the same rows in the same order, and are
measured on the same held-out ones, so most of the noise in the losses is common to all and does not shift a minimum.
Learning rate and batch depend on the budget alone (Llama 3, arXiv 2407.21783, section 3.2.1, fixes the batch of a
budget too).

    OUT/sweep.toml       the settings
    OUT/runs.jsonl       a line for each finished run: flops, params, tokens, loss, and what it was
    OUT/runs/NAME/       the run: config.toml, metrics.jsonl, model/, report.html

The same command resumes a sweep that was stopped: finished runs are not repeated, an unfinished one is resumed, and
budgets, sizes and seeds may be added. Price: sizes x seeds x the sum of the budgets.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from arriero import settings
from arriero.checkpoint.hf import save_hf
from arriero.data.shards import fingerprints, open_splits
from arriero.errors import ConfigError, TrainingError
from arriero.io.files import locked, write_json, write_jsonl, write_text
from arriero.io.reading import read_json
from arriero.model.build import build_model
from arriero.model.config import LlamaConfig
from arriero.show.terminal import notes
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.train import pretrain
from arriero.train.claim import refuse_changed
from arriero.train.config import LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig
from arriero.train.loop import Outcome
from arriero.train.metrics import duration, surviving_records
from arriero.train.scaling.config import SweepConfig
from arriero.train.scaling.laws import FLOPS_PER_PARAMETER, suggested_batch, suggested_lr

# settings that may differ when a sweep is resumed
ADDED = ("out", "budgets", "sizes", "spread", "tokens_per_param", "seeds")
WIDTHS = (*range(32, 256, 32), *range(256, 1024, 64), *range(1024, 4097, 128))
REPEATED = 4  # epochs up to which repeated text is about as good as new (Muennighoff et al., arXiv 2305.16264)
RUNS = "runs.jsonl"


@dataclass(frozen=True)
class PlannedRun:
    """One model of one budget."""

    flops: float
    shape: LlamaConfig
    seed: int
    tokens: float
    batch_rows: int
    lr: float

    @property
    def name(self) -> str:
        """Its directory."""
        return f"{self.flops:.3g}-{self.shape.dim}x{self.shape.n_layers}-{self.seed}"


def sweep(config: SweepConfig, console: Console | None = None) -> Outcome | None:
    """Do what is not done yet; returns how the last run ended, None where there was none to do.

    Raises a `UserError` before the first step for data, settings and budgets that cannot be used.
    """
    console = console or notes()
    out = Path(config.out)
    sources, held_out = open_splits(config.data)
    if not held_out:
        raise ConfigError(
            f"{config.data} holds no held-out documents, and the laws are about their loss; "
            "make shards with some: arriero shard ... --validation 0.01"
        )
    tokenizer = load_tokenizer(next(iter(sources.values())).tokenizer_directory)
    runs = planned_runs(config, tokenizer.vocab_size)
    busy = ConfigError(f"{out}: another process sweeps there; wait for it, or give another --out")
    with locked(out, busy):
        _claim(config, fingerprints(sources, held_out))
        return _train_all(runs, config, tokenizer, sum(shards.n_tokens for shards in sources.values()), console)


def _train_all(
    runs: list[PlannedRun], config: SweepConfig, tokenizer: Tokenizer, held_tokens: int, console: Console
) -> Outcome | None:
    out = Path(config.out)
    done = {record["name"] for record in surviving_records(out / RUNS)}
    console.print(_table(runs, done, held_tokens))
    waiting = [run for run in runs if run.name not in done]
    outcome, spent, began = None, 0.0, time.monotonic()
    for index, run in enumerate(waiting):
        seconds = (time.monotonic() - began) / spent * sum(r.flops for r in waiting[index:]) if spent else None
        left = f", about {duration(seconds)} left in all" if seconds else ""
        console.rule(f"run {len(runs) - len(waiting) + index + 1} of {len(runs)}: {run.name}{left}")
        outcome = _train(run, config, tokenizer)
        if outcome.interrupted is not None:
            console.print("the sweep goes on by the same command", markup=False)
            return outcome
        spent += run.flops
    console.print(f"{len(runs)} runs in {out / RUNS}; fit laws to them: arriero scaling fit {out}", markup=False)
    return outcome


def family(width: int, vocab_size: int, context: int) -> LlamaConfig:
    """The Llama of this width in a family whose members differ in size only; at 128 and 512 it is the ladder's own.

    A layer for every 64 of width, below 256 for every 32 up to 4; heads 64 wide (32 below 256); half as many KV heads
    where that is whole; a feed-forward of 3 times the width; tied embeddings.
    """
    n_heads = width // (32 if width < 256 else 64)
    n_kv_heads = n_heads if n_heads % 2 else n_heads // 2
    layers = max(min(width // 32, 4), round(width / 64))
    return LlamaConfig(width, layers, n_heads, n_kv_heads, 3 * width, vocab_size, context, tied_embeddings=True)


def planned_runs(config: SweepConfig, vocab_size: int) -> list[PlannedRun]:
    """All runs of a sweep, the cheapest first. Raises `ConfigError` where a budget is spent before the first step."""
    runs = []
    for flops in sorted(set(config.budgets)):
        rows = config.batch_rows or max(1, round(suggested_batch(flops) / config.seq_len))
        lr = config.lr or suggested_lr(flops)
        for shape in _shapes(flops, config, vocab_size):
            tokens = flops / (FLOPS_PER_PARAMETER * shape.n_params)
            if tokens < rows * config.seq_len:
                raise ConfigError(
                    f"budget {flops:.3g}: a model of {shape.n_params:,} parameters gets {tokens:,.0f} tokens, less "
                    f"than a batch of {rows} x {config.seq_len}; give larger budgets, or a smaller vocabulary than "
                    f"{vocab_size:,}, which makes the models as large as they are"
                )
            runs += [PlannedRun(flops, shape, seed, tokens, rows, lr) for seed in range(config.seeds)]
    return runs


def _shapes(flops: float, config: SweepConfig, vocab_size: int) -> list[LlamaConfig]:
    """Members of the family for one budget: the nearest to sizes in geometric steps around the middle, each once."""
    middle = math.sqrt(flops / (FLOPS_PER_PARAMETER * config.tokens_per_param))
    left = [family(width, vocab_size, config.seq_len) for width in WIDTHS]
    chosen = []
    for i in range(config.sizes):
        target = middle * config.spread ** (2 * i / (config.sizes - 1) - 1)
        chosen.append(min(left, key=lambda shape: abs(math.log(shape.n_params / target))))
        left.remove(chosen[-1])
    return sorted(chosen, key=lambda shape: shape.n_params)


def pretrain_config(run: PlannedRun, config: SweepConfig) -> PretrainConfig:
    """The settings of a run for `arriero pretrain`: one validation, at the end, and no samples."""
    directory = Path(config.out) / "runs" / run.name
    steps = max(1, round(run.tokens / (run.batch_rows * config.seq_len)))
    at_once = max(1, config.micro_tokens // config.seq_len)
    return PretrainConfig(
        model=str(directory / "init"),
        out=str(directory),
        resume=(directory / "config.toml").exists(),
        prompts=(),
        data=PretrainDataConfig(config.data, validation_tokens=config.validation_tokens, seq_len=config.seq_len),
        optim=OptimConfig(config.optimizer, lr=run.lr, schedule="wsd", min_lr=0.0, weight_decay=0.1),
        loop=LoopConfig(
            steps=steps,
            batch_rows=run.batch_rows,
            micro_rows=max(n for n in range(1, at_once + 1) if run.batch_rows % n == 0),
            precision=config.precision,
            compile=config.compile,
            seed=run.seed,
            log_every=max(1, steps // 200),
            validate_every=steps,
            keep_last=1,
        ),
    )


def _train(run: PlannedRun, config: SweepConfig, tokenizer: Tokenizer) -> Outcome:
    """One run to its end, and its line in runs.jsonl; what only a resume needs is removed then."""
    settled = pretrain_config(run, config)
    directory = Path(settled.out)
    if not (directory / "init").exists():
        model = build_model(run.shape).init_weights(seed=run.seed, depth_scaled=True)
        save_hf(model, directory / "init", tokenizer, dtype=torch.float32)
    torch.compiler.reset()  # type: ignore[no-untyped-call]  # else code for ever more shapes is kept, up to a limit
    outcome = pretrain.main(settled)
    if outcome.interrupted is not None:
        return outcome
    p = outcome.progress
    if not math.isfinite(loss := p.validation[p.step]):
        raise TrainingError(
            f"{directory}: the run ended with a loss of {loss}, of which no law can be made; sweep again with an lr "
            f"below {run.lr}, into another --out"
        )
    record = {
        "name": run.name,
        "flops": run.flops,
        "params": run.shape.n_params,
        "tokens": settled.loop.steps * run.batch_rows * config.seq_len,
        "loss": loss,
        "width": run.shape.dim,
        "layers": run.shape.n_layers,
        "seed": run.seed,
        "steps": p.step,
        "lr": run.lr,
        "seconds": p.seconds,
    }
    _append(Path(config.out) / RUNS, record)
    for part in ("init", "checkpoints"):
        shutil.rmtree(directory / part, ignore_errors=True)
    return outcome


def _claim(config: SweepConfig, prints: dict[str, str]) -> None:
    """Start in the directory, or resume with the same settings and data; else raise `ConfigError` or `DataError`."""
    out = Path(config.out)
    record, data = out / "sweep.toml", out / "data.json"
    if record.exists():
        earlier, now = settings.to_dict(settings.load(SweepConfig, record)), settings.to_dict(config)
        differing = [name for name in now if name not in ADDED and now[name] != earlier[name]]
        if differing:
            raise ConfigError(
                f"{record}: this sweep was begun with other settings ({', '.join(differing)}), so losses could not "
                "be compared; give the same ones, or another --out"
            )
        refuse_changed(read_json(data), prints, f"the sweep in {out}")
    write_json(data, prints)
    write_text(record, settings.to_toml(config))


def _append(path: Path, record: dict[str, Any]) -> None:
    """Add a line, so that a reader sees all lines or those before."""
    write_jsonl(path, [*surviving_records(path), record])


def _table(runs: list[PlannedRun], done: set[str], held_tokens: int) -> Table:
    """What will be run, a line for each budget."""
    total = sum(run.flops for run in runs)
    table = Table(title=f"{len(runs)} runs, {total:.3g} FLOPs", caption=_repeated(runs, held_tokens))
    for heading in ("FLOPs a run", "models", "parameters", "tokens", "batch", "lr", "done"):
        table.add_column(heading, justify="right")
    for flops in dict.fromkeys(run.flops for run in runs):
        own = [run for run in runs if run.flops == flops]
        table.add_row(
            f"{flops:.3g}",
            str(len(own)),
            f"{own[0].shape.n_params:,} to {own[-1].shape.n_params:,}",
            f"{own[0].tokens:,.0f} to {own[-1].tokens:,.0f}",
            f"{own[0].batch_rows} rows",
            f"{own[0].lr:.2g}",
            str(sum(run.name in done for run in own)),
        )
    return table


def _repeated(runs: list[PlannedRun], held_tokens: int) -> str | None:
    epochs = max(run.tokens for run in runs) / held_tokens
    if epochs <= REPEATED:
        return None
    return (
        f"the longest run reads the data {epochs:.1f} times: beyond about {REPEATED} repeated text is worth less than "
        "new (arXiv 2305.16264), and the fit will favour larger models than it should"
    )
