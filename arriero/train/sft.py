"""Supervised fine-tuning: the recipe behind `arriero sft`.

Loss on the assistant's tokens only (arXiv 2307.09288, section 3.1), packed rows, document masks. Ends with `adapter/`
in PEFT's layout or `model/` in Hugging Face's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from arriero.checkpoint.adapter import save_adapter
from arriero.checkpoint.beside import NOTHING, Beside, read_beside
from arriero.checkpoint.export import export_hf
from arriero.checkpoint.held import write_kind
from arriero.checkpoint.hf import sidecar_writer
from arriero.checkpoint.load import load_tokenizer_at, open_model
from arriero.checkpoint.rows import check_rows
from arriero.data.batch import Batch
from arriero.data.sft import SftDataset, build_splits, data_stats
from arriero.data.sft_loader import SftLoader
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh
from arriero.distributed.parallelize import parallelize
from arriero.model.llama import Llama
from arriero.model.lora import add_lora
from arriero.model.quantized import quantize_linears
from arriero.model.scaling import DynamicScaling
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.files import save_template
from arriero.train.batches import micro_batches
from arriero.train.config import SftConfig
from arriero.train.learner import Learner
from arriero.train.loop import Outcome, Trainer
from arriero.train.objectives import next_token
from arriero.train.recipe import DTYPES, alone, compiles, execute, first_values, warmup_note
from arriero.train.samples import answer, write_samples
from arriero.train.validation import HeldOut, Validation


def main(config: SftConfig) -> Outcome:
    """Fine-tune as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    return execute(config, "sft", build)


@dataclass(frozen=True)
class SftRun:
    """Everything a run is made of, ready for step 1."""

    config: SftConfig
    model: Llama
    tokenizer: Tokenizer
    training: SftDataset
    validation: SftDataset | None
    loader: SftLoader
    trainer: Trainer
    beside: Beside

    @property
    def total_tokens(self) -> int:
        """Tokens through the model over the whole run, padding included."""
        return self.trainer.total_steps * self.config.loop.batch_rows * self.config.data.seq_len

    def summary(self) -> str:
        """What is about to happen, in a few lines."""
        config, trained = self.config, sum(p.numel() for p in self.trainer.learner.parameters.values())
        total = self.model.config.n_params + (trained if config.method == "lora" else 0)
        rows = self.loader.rows_in_epoch(0)
        held_out = 0 if self.validation is None else len(self.validation)
        held = "" if config.quantize == "none" else f" held in {config.quantize}"
        return (
            f"{config.model}{held}: {config.method}, {trained:,} of {total:,} parameters trained "
            f"({config.loop.precision})\n"
            f"{len(self.training):,} examples, {rows:,} rows of {config.data.seq_len:,} tokens; {held_out:,} held out\n"
            f"{self.trainer.total_steps:,} steps of {config.loop.batch_rows} rows -> {config.out}"
            + warmup_note(config.optim, self.trainer.total_steps)
        )

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the rows as tokens, training and validation."""
        both = {"training data": self.training, "validation data": self.validation}
        found = {f"the {name}": rows.fingerprint for name, rows in both.items() if rows is not None}
        if self.config.chat_template and self.tokenizer.chat_template is not None:  # a file may have changed
            found["the chat template"] = self.tokenizer.chat_template.fingerprint
        return found

    def data_statistics(self) -> dict[str, Any]:
        """What is learned from, and how much."""
        return {
            "train": self.config.data.train,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            **data_stats(self.training, self.loader.seq_len).to_dict(),
            "validation_examples": 0 if self.validation is None else len(self.validation),
        }

    def sample(self, when: Literal["before", "after"]) -> None:
        """Answer a few held-out prompts."""
        if (model := self.trainer.learner.engine.whole_model()) is None:
            return
        answers = answer(model, self.tokenizer, self.validation, self.config.samples)
        write_samples(Path(self.config.out), answers, when)

    def export(self) -> Path:
        """Write the trained adapter (PEFT's layout) or model (Hugging Face's); returns its directory."""
        config, engine = self.config, self.trainer.learner.engine
        directory = Path(config.out) / ("adapter" if config.method == "lora" else "model")
        if config.method == "full":
            export_hf(engine, directory, self.tokenizer, dtype=DTYPES[config.loop.precision], beside=self.beside)
        elif (tensors := dict(engine.trained_tensors())) and engine.mesh.rank == 0:
            save_adapter(tensors, directory, config.lora, config.model, self._save_beside)
        return directory

    def _save_beside(self, directory: Path) -> None:
        """What belongs to an adapter: the template that it was trained with, and how its base was held."""
        save_template(self.tokenizer, directory)
        if self.config.quantize != "none":
            write_kind(directory, self.config.quantize)


def build(config: SftConfig, console: Console, mesh: Mesh | None = None) -> SftRun:
    """Load, tokenise, adapt, split over `mesh` (None: one process): everything up to step 1."""
    loop, mesh = config.loop, mesh or alone()
    mesh.config.check_batch(loop.batch_rows, loop.micro_rows, config.data.seq_len)
    # A frozen base is computed with, never updated, so it is held in the compute type; trained weights stay fp32.
    stored = DTYPES[loop.precision] if config.method == "lora" else torch.float32
    model, weights = open_model(config.model, stored)
    model.config.check_length(config.data.seq_len)
    tokenizer = load_tokenizer_at(weights.source, chat_template=config.chat_template)
    check_rows(weights.source, model.config.vocab_size, tokenizer)
    with mesh.one_before_others():  # who come later find the tokens in the cache
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
    adapted(model, config)
    model.set_compute_dtype(DTYPES[loop.precision]).train()
    compiled = compiles(loop, steps * loop.batch_rows * config.data.seq_len)
    values = first_values(weights.part, loop.seed)
    engine = Engine(parallelize(model, mesh, values=values, recompute=loop.recompute, compile=compiled), mesh)
    row = config.data.seq_len if compiled or config.data.packing else None  # see `batch.collate`
    if isinstance(model.config.rope_scaling, DynamicScaling):
        row = None  # what fills a batch up may be longer than any text, and than the positions that the model has

    def batches(step: int) -> list[Batch]:
        first, pad_to = step * loop.batch_rows, row and loop.micro_rows * row
        return micro_batches(loader, first, loop.batch_rows, loop.micro_rows, mesh, pad_to)

    validate = None
    if validation is not None:
        held_out = SftLoader(validation, config.data.seq_len, seed=0)
        measured = HeldOut(lambda i: held_out.collate([held_out.row(i)], row), held_out.rows_in_epoch(0))
        validate = Validation(engine, {"held out": measured})
    whole = config.method != "lora"  # an adapter goes without what its base says
    beside = read_beside(weights.source).for_training(tokenizer) if whole else NOTHING
    files = sidecar_writer(model.config, tokenizer, beside) if whole else None
    learner = Learner(engine, next_token(), config.optim, steps, seed=loop.seed, spike=loop.spike, average=loop.average)
    trainer = Trainer(learner, batches, steps, loop, Path(config.out), validate, files)
    return SftRun(config, model, tokenizer, training, validation, loader, trainer, beside)


def adapted(model: Llama, config: SftConfig) -> Llama:
    """The model with what is trained in it: its base held as told, and an adapter; in place."""
    if config.quantize != "none":
        quantize_linears(model, config.quantize)
    return add_lora(model, config.lora) if config.method == "lora" else model
