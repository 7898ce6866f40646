"""Pretraining: the recipe behind `arriero pretrain`.

Next-token loss on every token of packed documents (Llama 1, arXiv 2302.13971, section 2; Llama 3, 2407.21783, section
3.4), from random weights at a known shape or from a model that goes on. The batch, the length of rows and the mixture
may change in the middle of a run (`TrainingStage`); what a step reads is still a pure function of its number. Ends with
`model/` in Hugging Face's layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from arriero.checkpoint.beside import Beside
from arriero.checkpoint.export import export_hf
from arriero.checkpoint.hf import sidecar_writer
from arriero.data.batch import collate
from arriero.data.held_out import HeldOutRows, held_out_rows
from arriero.data.prefetch import Prefetched
from arriero.data.shards import Shards, fingerprints, open_splits
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh
from arriero.distributed.parallelize import parallelize
from arriero.model.catalogue import named_shape
from arriero.model.llama import Llama
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.train.config import PretrainConfig
from arriero.train.hardware import keep_freed_memory, seconds_at_peak
from arriero.train.initial_model import initial_model
from arriero.train.learner import Learner
from arriero.train.loop import Outcome, Trainer
from arriero.train.objectives import next_token
from arriero.train.phases import (
    Phase,
    batches_of,
    count_steps,
    durations,
    mixture,
    open_rows,
    phases_of,
    timetable,
    tokens_of,
)  # fmt: skip
from arriero.train.recipe import DTYPES, alone, compiles, execute, warmup_note
from arriero.train.samples import continuations, encode_prompts
from arriero.train.validation import HeldOut, Validation, validation_interval


def main(config: PretrainConfig) -> Outcome:
    """Pretrain as `config` says. Raises a `UserError` before step 1 for whatever cannot be trained on."""
    return execute(config, "pretrain", build)


@dataclass(frozen=True)
class PretrainRun:
    """Everything a run is made of, ready for step 1."""

    config: PretrainConfig
    model: Llama
    tokenizer: Tokenizer
    sources: Mapping[str, Shards]
    held_out: Mapping[str, Shards]
    phases: Sequence[Phase]
    trainer: Trainer
    beside: Beside

    @property
    def total_tokens(self) -> int:
        """Tokens through the model over the whole run, padding included."""
        return tokens_of(self.phases, self.trainer.total_steps)

    def summary(self) -> str:
        """What is about to happen, in a few lines."""
        config, total = self.config, self.trainer.total_steps
        tokens = self.total_tokens
        held = sum(shards.n_tokens for shards in self.sources.values())
        begins = "random weights" if named_shape(config.model) else "its weights"
        parts = ["what comes before the stages", *(f"the stage at {stage.start:g}" for stage in config.stages)]
        steps = durations(timetable(config, {}, total), total)
        empty = [part for part, n in zip(parts, steps, strict=True) if not n]
        return (
            f"{config.model}: {self.model.config.n_params:,} parameters, from {begins} ({config.loop.precision}), "
            f"{config.optim.optimizer}\n"
            f"{total:,} steps, {tokens:,} tokens: {tokens / held:.2f} times the {held:,} of "
            f"{len(self.sources)} source{'s' if len(self.sources) > 1 else ''} -> {config.out}"
            + warmup_note(config.optim, total)
            + ("" if self.held_out else "\nno documents are held out, so nothing is validated")
            + "".join(f"\nnone of so few steps is left for {part}" for part in empty)
        )

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the shards, which hold those of every byte and of the tokenizer."""
        return fingerprints(self.sources, self.held_out)

    def data_statistics(self) -> dict[str, Any]:
        """What is learned from, and how much."""
        return {
            "train": self.config.data.train,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "documents": {name: shards.n_documents for name, shards in self.sources.items()},
            "tokens": {name: shards.n_tokens for name, shards in self.sources.items()},
        }

    def sample(self, when: Literal["before", "after"]) -> None:
        """Nothing apart: what the model says is recorded at every validation, the first and last among them."""

    def export(self) -> Path:
        """Write the model in Hugging Face's layout; returns its directory."""
        directory, precision = Path(self.config.out) / "model", DTYPES[self.config.loop.precision]
        export_hf(self.trainer.learner.engine, directory, self.tokenizer, dtype=precision, beside=self.beside)
        return directory


def build(config: PretrainConfig, console: Console, mesh: Mesh | None = None) -> PretrainRun:
    """Open the shards, make or load the model, split it over `mesh` (None: one process): everything up to step 1."""
    loop, data, mesh = config.loop, config.data, mesh or alone()
    sources, held_out = open_splits(data.train, data.validation)
    tokenizer = load_tokenizer(next(iter(sources.values())).tokenizer_directory)
    weights = mixture(config, sources)
    steps = count_steps(config, sum(shards.n_tokens for shards in sources.values()))
    phases = phases_of(config, weights, steps)
    tokens = tokens_of(phases, steps)
    initial = initial_model(config, tokenizer, max(phase.seq_len for phase in phases))
    model = initial.model.set_compute_dtype(DTYPES[loop.precision]).train()
    prompts = encode_prompts(config.prompts, tokenizer, model.config.max_context)
    compiled = compiles(loop, tokens)
    keep_freed_memory()
    for phase in phases:
        mesh.config.check_batch(phase.batch_rows, loop.micro_rows, phase.seq_len)
    engine = Engine(parallelize(model, mesh, values=initial.values, recompute=loop.recompute, compile=compiled), mesh)
    rows = open_rows(config, sources, phases, steps)
    learner = Learner(
        engine,
        next_token(z_loss=config.z_loss, compile=compiled),
        config.optim,
        steps,
        seed=loop.seed,
        spike=loop.spike,
        average=loop.average,
        seconds_at_peak=seconds_at_peak(model.config, str(mesh.device), DTYPES[loop.precision]),
    )
    validate = None
    if held_out:
        found = held_out_rows(held_out, tokenizer, data.seq_len, data.validation_tokens)
        measured = {name: _measured(one, data.seq_len) for name, one in found.items()}
        validate = Validation(engine, measured, samples=lambda: continuations(engine, tokenizer, prompts))
        n_measured = min(data.validation_tokens, sum(shards.n_tokens for shards in held_out.values()))
        every = loop.validate_every or validation_interval(steps, tokens, n_measured)
        loop = dataclasses.replace(loop, validate_every=every)
    trainer = Trainer(
        learner,
        Prefetched(batches_of(phases, rows, loop.micro_rows, mesh), steps),
        steps,
        loop,
        Path(config.out),
        validate,
        sidecar_writer(model.config, tokenizer, initial.beside),
    )
    return PretrainRun(config, model, tokenizer, sources, held_out, phases, trainer, initial.beside)


def _measured(rows: HeldOutRows, seq_len: int) -> HeldOut:
    return HeldOut(lambda i: collate([rows.row(i)], seq_len), rows.n_rows, rows.n_bytes)
