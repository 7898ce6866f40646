"""Supervised fine-tuning: the recipe behind `arriero sft`.

Loss on the assistant's tokens only (arXiv 2307.09288, section 3.1), packed rows, document masks. All that can be
refused is refused before step 1: config, run directory, data, masks, template. The run directory is a complete
record (layout in train/report.py) and ends with `adapter/` in PEFT's layout or `model/` in Hugging Face's.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from arriero import config as configs
from arriero.checkpoint import native
from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.files import write_json
from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load
from arriero.data.loader import Batch, SftLoader
from arriero.data.sft import SftDataset, build_splits, data_stats
from arriero.distributed.parallelize import prepare
from arriero.errors import ConfigError
from arriero.model.llama import Llama
from arriero.model.lora import add_lora
from arriero.tokenizer.base import Tokenizer
from arriero.train.config import LoopConfig, SftConfig
from arriero.train.environment import describe
from arriero.train.loop import Outcome, Trainer
from arriero.train.metrics import MetricsLog
from arriero.train.objectives import lm_loss
from arriero.train.report import write_report
from arriero.train.samples import answer, write_samples

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMPILE_FROM = 300_000  # tokens of a run above which compiling (half a minute to a minute) pays on two cores


def main(config: SftConfig) -> Outcome:
    """Fine-tune as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    console = Console(stderr=True)
    run_dir = Path(config.out)
    saved = open_run(run_dir, config)
    run = build(config, console)
    record(run, run_dir)
    console.print(run.summary())
    if saved is not None:
        run.trainer.restore(saved)
        console.print(f"resuming at step {saved.step} from {saved.path}", markup=False)
    if run.trainer.progress.step == 0:
        write_samples(run_dir, answer(run.model, run.tokenizer, run.validation, config.samples), "before")
    with MetricsLog(run_dir, config.loop.trackers, after=run.trainer.progress.step) as log:
        outcome = run.trainer.run(log)
    if outcome.interrupted is not None:
        console.print(
            f"stopped by {outcome.interrupted.name} after step {outcome.progress.step} of {run.trainer.total_steps}; "
            f"go on with: arriero run {run_dir / 'config.toml'} --resume",
            markup=False,
        )
        return outcome
    run.trainer.load_best()
    write_samples(run_dir, answer(run.model, run.tokenizer, run.validation, config.samples), "after")
    final = export(run, run_dir)
    report = write_report(run_dir)
    console.print(f"saved {final}\nreport {report}", markup=False)
    return outcome


@dataclass(frozen=True)
class Run:
    """Everything a run is made of, ready for step 1."""

    config: SftConfig
    model: Llama
    tokenizer: Tokenizer
    training: SftDataset
    validation: SftDataset | None
    loader: SftLoader
    trainer: Trainer

    def summary(self) -> str:
        """What is about to happen, in a few lines."""
        trained = sum(p.numel() for p in self.trainer.parameters.values())
        total = sum(p.numel() for p in self.model.parameters())
        config, rows = self.config, self.loader.rows_in_epoch(0)
        held_out = 0 if self.validation is None else len(self.validation)
        return (
            f"{config.model}: {config.method}, {trained:,} of {total:,} parameters trained ({config.loop.precision})\n"
            f"{len(self.training):,} examples, {rows:,} rows of {config.data.seq_len:,} tokens; {held_out:,} held out\n"
            f"{self.trainer.total_steps:,} steps of {config.loop.batch_rows} rows -> {config.out}"
        )


def open_run(run_dir: Path, config: SftConfig) -> native.Saved | None:
    """Claim the run directory: refuse one in use, or find the checkpoint to resume from."""
    record_file = run_dir / "config.toml"
    if not config.model or not config.data.train:
        missing = "model" if not config.model else "data.train"
        raise ConfigError(f"{missing} is not set; say what to train: arriero sft MODEL --data FILE")
    if not config.resume:
        if record_file.exists():
            raise ConfigError(
                f"{run_dir} holds a run already; add --resume to go on with it, choose another --out, or delete it"
            )
        return None
    if not record_file.exists():
        raise ConfigError(f"{run_dir} holds no run to resume; leave --resume out to start one")
    _, earlier = configs.load_recipe({"sft": SftConfig}, record_file)
    differing = [
        path
        for path in configs.field_paths(SftConfig)
        if path not in ("resume", "out", "loop.trackers", "data.workers")
        and _at(configs.to_dict(config), path) != _at(configs.to_dict(earlier), path)
    ]
    if differing:
        raise ConfigError(
            f"{record_file}: this run was started with other settings ({', '.join(differing)}); an exact resume needs "
            f"the same ones: arriero run {record_file} --resume"
        )
    return native.latest(run_dir)


def build(config: SftConfig, console: Console) -> Run:
    """Load, tokenise, adapt: everything up to step 1."""
    loop = config.loop
    torch.manual_seed(loop.seed)  # the adapter's first weights
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A frozen base is computed with, never updated, so it is held in the compute type; trained weights stay fp32.
    stored = DTYPES[loop.precision] if config.method == "lora" else torch.float32
    model, tokenizer = load(config.model, dtype=stored, device=device)
    training, validation = build_splits(
        config.data.train,
        config.data.validation,
        tokenizer,
        max_length=config.data.seq_len,
        max_truncated=config.data.max_truncated,
        workers=config.data.workers,
        console=console,
    )
    loader = SftLoader(training, config.data.seq_len, loop.seed, config.data.packing)
    steps = loop.steps or max(1, math.ceil(loop.epochs * loader.rows_in_epoch(0) / loop.batch_rows))
    if config.method == "lora":
        add_lora(model, config.lora)
    model.set_compute_dtype(DTYPES[loop.precision]).train()
    compiled = compiles(loop, steps * loop.batch_rows * config.data.seq_len)
    prepare(model, checkpoint_activations=loop.checkpoint_activations, compile=compiled)
    pad_to = loop.micro_rows * config.data.seq_len if compiled else None  # compiled code wants one shape

    def batches(step: int) -> list[Batch]:
        first = step * loop.batch_rows
        starts = range(first, first + loop.batch_rows, loop.micro_rows)
        rows = ([loader.row(i) for i in range(start, start + loop.micro_rows)] for start in starts)
        return [loader.collate(micro, pad_to).to(device) for micro in rows]

    validate = None
    if validation is not None:
        held_out = SftLoader(validation, config.data.seq_len, seed=0)
        validate = Validation(model, held_out, pad_to=config.data.seq_len if compiled else None, device=device)
    trainer = Trainer(model, lm_loss, batches, steps, loop, config.optim, Path(config.out), validate)
    return Run(config, model, tokenizer, training, validation, loader, trainer)


@dataclass(frozen=True)
class Validation:
    """Mean loss per trained token over the held-out rows, in nats."""

    model: Llama
    loader: SftLoader
    pad_to: int | None
    device: str

    def __call__(self) -> float:
        total, count = 0.0, 0
        for index in range(self.loader.rows_in_epoch(0)):
            batch = self.loader.collate([self.loader.row(index)], self.pad_to).to(self.device)
            total += lm_loss(self.model, batch).item()
            count += batch.n_trained
        return total / count


def compiles(loop: LoopConfig, tokens: int) -> bool:
    """Whether to compile the blocks: as told, or when the run is long enough and a C++ compiler is at hand."""
    if loop.compile != "auto":
        return loop.compile == "on"
    return tokens >= COMPILE_FROM and (torch.cuda.is_available() or shutil.which("g++") is not None)


def record(run: Run, run_dir: Path) -> None:
    """Write what decides the run, before step 1: config.toml, data.json, environment.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    settled = dataclasses.replace(run.config, resume=False)
    (run_dir / "config.toml").write_text(configs.to_toml(settled, "sft"), encoding="utf-8")
    write_json(run_dir / "environment.json", describe())
    write_json(run_dir / "data.json", data_statistics(run))


def data_statistics(run: Run) -> dict[str, Any]:
    """What is learned from: files, fingerprints, and how much."""
    out: dict[str, Any] = {
        "train": run.config.data.train,
        "train_fingerprint": run.training.fingerprint,
        "tokenizer_fingerprint": run.tokenizer.fingerprint,
        **data_stats(run.training, run.loader.seq_len).to_dict(),
    }
    if run.validation is not None:
        out |= {"validation_examples": len(run.validation), "validation_fingerprint": run.validation.fingerprint}
    return out


def export(run: Run, run_dir: Path) -> Path:
    """Write the trained adapter (PEFT's layout) or model (Hugging Face's); returns its directory."""
    if run.config.method == "lora":
        save_adapter(run.model, run_dir / "adapter", run.config.lora, run.config.model)
        return run_dir / "adapter"
    save_hf(run.model, run_dir / "model", run.tokenizer, dtype=DTYPES[run.config.loop.precision])
    return run_dir / "model"


def _at(values: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values
