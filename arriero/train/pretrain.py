"""Pretraining: the recipe behind `arriero pretrain`.

Next-token loss on every token of packed documents (Llama 1, arXiv 2302.13971, section 2; Llama 3, 2407.21783, section
3.4), from random weights at a known shape or from a model that goes on. The batch, the length of rows and the mixture
may change in the middle of a run (`TrainingStage`); what a step reads is still a pure function of its number. Ends with
`model/` in Hugging Face's layout.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from arriero.checkpoint.beside import NOTHING, Beside, read_beside
from arriero.checkpoint.hf import companions, save_hf
from arriero.checkpoint.load import has_tokenizer, load_tokenizer_at, open_model
from arriero.checkpoint.rows import check_rows
from arriero.checkpoint.source import resolve
from arriero.data.batch import Batch, collate, row_groups
from arriero.data.held_out import HeldOutRows, first_rows
from arriero.data.prefetch import Prefetched
from arriero.data.pretrain_loader import DataStage, PretrainLoader
from arriero.data.shards import Shards, fingerprints, open_splits
from arriero.distributed.engine import Engine
from arriero.distributed.materialise import Values
from arriero.distributed.mesh import Mesh
from arriero.distributed.parallelize import parallelize
from arriero.errors import ConfigError, DataError, did_you_mean
from arriero.infer.config import SamplingConfig
from arriero.infer.generate import generate
from arriero.model.build import build_model, empty_model
from arriero.model.catalogue import LADDER, SHAPES, named_shape
from arriero.model.config import LlamaConfig
from arriero.model.initial import initial_weight
from arriero.model.llama import Llama
from arriero.show.terminal import warn_once
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.train.config import PretrainConfig, PretrainDataConfig
from arriero.train.hardware import keep_freed_memory, matmul_peak, refuse_what_cannot_fit
from arriero.train.loop import Outcome, Trainer
from arriero.train.objectives import next_token
from arriero.train.recipe import DTYPES, alone, compiles, eagerly, execute, warmup_note

SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95, seed=0)
SAMPLE_TOKENS = 64


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
        directory = Path(self.config.out) / "model"
        if (model := self.trainer.engine.whole_model(lambda: build_model(self.model.config))) is not None:
            precision = DTYPES[self.config.loop.precision]
            save_hf(model, directory, self.tokenizer, dtype=precision, beside=self.beside)
        return directory


@dataclass(frozen=True)
class Phase:
    """Steps from `first_step` on: what one reads."""

    first_step: int
    first_row: int
    batch_rows: int
    seq_len: int
    weights: Mapping[str, float]

    @property
    def tokens_a_step(self) -> int:
        """Tokens of a global batch, padding included."""
        return self.batch_rows * self.seq_len


def timetable(config: PretrainConfig, weights: Mapping[str, float], total_steps: int) -> list[Phase]:
    """The phases of a run of `total_steps`; `weights` hold until a stage changes them."""
    phases = [Phase(0, 0, config.loop.batch_rows, config.data.seq_len, weights)]
    for stage in config.stages:
        last, first_step = phases[-1], round(stage.start * total_steps)
        phases.append(
            Phase(
                first_step,
                last.first_row + (first_step - last.first_step) * last.batch_rows,
                stage.batch_rows or last.batch_rows,
                stage.seq_len or last.seq_len,
                stage.weights or last.weights,
            )
        )
    return phases


def durations(phases: Sequence[Phase], total_steps: int) -> list[int]:
    """Steps of each phase."""
    starts = [*(phase.first_step for phase in phases), total_steps]
    return [end - start for start, end in itertools.pairwise(starts)]


def tokens_of(phases: Sequence[Phase], total_steps: int) -> int:
    """Tokens of a whole run, padding included."""
    steps = durations(phases, total_steps)
    return sum(phase.tokens_a_step * n for phase, n in zip(phases, steps, strict=True))


def count_steps(config: PretrainConfig, held_tokens: int) -> int:
    """Steps that reach `tokens`, or `steps` as given, or `epochs` passes over `held_tokens`."""
    if config.loop.steps and not config.tokens:
        return config.loop.steps
    fine = 1_000_000  # a run of so many steps, for the mean tokens of a step whatever the stages
    mean = tokens_of(timetable(config, {}, fine), fine) / fine
    return max(1, round((config.tokens or config.loop.epochs * held_tokens) / mean))


def build(config: PretrainConfig, console: Console, mesh: Mesh | None = None) -> PretrainRun:
    """Open the shards, make or load the model, split it over `mesh` (None: one process): everything up to step 1."""
    loop, data, mesh = config.loop, config.data, mesh or alone()
    device = mesh.device
    sources, held_out = open_splits(data.train, data.validation)
    tokenizer = load_tokenizer(next(iter(sources.values())).tokenizer_directory)
    weights = mixture(config, sources)
    total_steps = count_steps(config, sum(shards.n_tokens for shards in sources.values()))
    phases = timetable(config, weights, total_steps)
    phases = [phase for phase, n in zip(phases, durations(phases, total_steps), strict=True) if n]
    model, values = make_model(config, tokenizer, max(phase.seq_len for phase in phases))
    beside = NOTHING if config.model in SHAPES else read_beside(resolve(config.model)).for_training(tokenizer)
    prompts = encode_prompts(config.prompts, tokenizer, model.config.max_context)
    model.set_compute_dtype(DTYPES[loop.precision]).train()
    compiled = compiles(loop, tokens_of(phases, total_steps))
    keep_freed_memory()
    for phase in phases:
        mesh.config.check_batch(phase.batch_rows, loop.micro_rows, phase.seq_len)
    engine = Engine(parallelize(model, mesh, values=values, recompute=loop.recompute, compile=compiled), mesh)
    stages = [DataStage(phase.first_row, phase.seq_len, dict(phase.weights)) for phase in phases]
    loader = PretrainLoader(sources, stages, loop.seed, data.packing, data.max_epochs)
    rows = phases[-1].first_row + durations(phases, total_steps)[-1] * phases[-1].batch_rows
    if loader.n_rows is not None and loader.n_rows < rows:
        raise ConfigError(
            f"the run reads {rows:,} rows, but max_epochs ends the sources after {loader.n_rows:,}; "
            "raise max_epochs, train for fewer tokens, or add data"
        )
    if held_out and not loop.validate_every:
        measured = min(data.validation_tokens, sum(shards.n_tokens for shards in held_out.values()))
        every = validation_interval(total_steps, tokens_of(phases, total_steps), measured)
        loop = dataclasses.replace(loop, validate_every=every)
    starts = [phase.first_step for phase in phases]

    def batches(step: int) -> list[Batch]:
        phase = phases[bisect.bisect_right(starts, step) - 1]
        first = phase.first_row + (step - phase.first_step) * phase.batch_rows
        groups = row_groups(first, loop.micro_rows, mesh.share(phase.batch_rows // loop.micro_rows))
        pad_to = loop.micro_rows * phase.seq_len  # one shape, see `batch.collate`
        return [loader.collate([loader.row(i) for i in rows], pad_to).to(device) for rows in groups]

    validate = Validation(config, engine, tokenizer, held_out_rows(data, held_out, tokenizer), prompts)
    trainer = Trainer(
        engine,
        next_token(z_loss=config.z_loss, compile=compiled),
        Prefetched(batches, total_steps),
        total_steps,
        loop,
        config.optim,
        Path(config.out),
        validate if held_out else None,
        seconds_at_peak(model.config, str(device), DTYPES[loop.precision]),
        companions(model.config, tokenizer, beside),
    )
    return PretrainRun(config, model, tokenizer, sources, held_out, phases, trainer, beside)


def held_out_rows(
    data: PretrainDataConfig, held_out: Mapping[str, Shards], tokenizer: Tokenizer
) -> dict[str, HeldOutRows]:
    """About `validation_tokens` of the held-out sets, of each in proportion to its size.

    A set of which no token is predicted is left out, with a warning; raises `DataError` where that leaves none.
    """
    total = sum(shards.n_tokens for shards in held_out.values())
    found = {}
    for name, shards in held_out.items():
        share = math.ceil(data.validation_tokens * shards.n_tokens / total)
        rows = first_rows(shards, name, tokenizer, data.seq_len, share)
        if rows.n_tokens:
            found[name] = rows
        else:
            warn_once(f"{shards.directory}: its documents are of one token each, which nothing predicts: not measured")
    if held_out and not found:
        raise DataError(
            f"{next(iter(held_out.values())).directory}: every held-out document is one token, which nothing predicts; "
            "hold out others (arriero shard --validation), or validate on another set (--validation DIR)"
        )
    return found


def validation_interval(steps: int, tokens: int, measured: int) -> int:
    """Steps between validations of `measured` tokens: ten in a run of `tokens`, or fewer that take a tenth of its time.

    A token that is measured takes a third of the time of one that is trained on.
    """
    return math.ceil(steps / min(10, max(1, 3 * tokens // (10 * max(1, measured)))))


def mixture(config: PretrainConfig, sources: Mapping[str, Shards]) -> dict[str, float]:
    """Weights by source: as given, else by size. Raises `ConfigError` for a source that is not there."""
    for named in (config.data.weights, config.data.max_epochs, *(stage.weights for stage in config.stages)):
        for name in named:
            if name not in sources:
                raise ConfigError(
                    f"no source {name!r} in {config.data.train}{did_you_mean(name, sources)} "
                    f"(there are: {', '.join(sources)})"
                )
    return config.data.weights or {name: float(shards.n_tokens) for name, shards in sources.items()}


def make_model(config: PretrainConfig, tokenizer: Tokenizer, seq_len: int) -> tuple[Llama, Values]:
    """A new model of the shape that `config.model` names, or the model of that name; without memory, and its values.

    A shape of the ladder gets the tokenizer's vocabulary and the context of its longest row (past it a model is lost);
    a published one keeps its own, if its vocabulary holds the tokenizer's. A model's own tokenizer must give the ids
    of the shards the same meaning; one that comes without a tokenizer is taken on trust.
    """
    if (shape := named_shape(config.model)) is None:
        near = did_you_mean(config.model, SHAPES)
        if near and "/" not in config.model and not Path(config.model).exists():
            raise ConfigError(f"no shape or model {config.model!r}{near} (arriero ls models lists the shapes)")
        path = resolve(config.model)
        own = load_tokenizer_at(path) if has_tokenizer(path) else None
        if own is not None and not own.holds(tokenizer):
            raise ConfigError(
                f"the shards' ids are not those of {config.model}: its own tokenizer reads them as other text; "
                "shard the data with it (arriero shard --tokenizer), or begin with a shape instead of a model"
            )
        model, weights = open_model(path, torch.float32)
        if own is not None:
            check_rows(path, model.config.vocab_size, own)
        _check_vocabulary(config.model, model.config.vocab_size, tokenizer)
        changes: dict[str, Any] = {"max_context": max(seq_len, model.config.max_context)}
        if config.rope_theta:
            changes["rope_theta"] = config.rope_theta
        model.config = model.model.config = dataclasses.replace(model.config, **changes)
        return model, weights.part
    if config.model in LADDER:
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size, max_context=seq_len)
    _check_vocabulary(config.model, shape.vocab_size, tokenizer)
    theta = config.rope_theta or shape.rope_theta
    shape = dataclasses.replace(shape, max_context=max(seq_len, shape.max_context), rope_theta=theta)
    refuse_what_cannot_fit(config.model, shape.n_params)
    drawn = functools.partial(initial_weight, seed=config.loop.seed, depth_scaled=shape.n_layers)
    return empty_model(shape), drawn


def encode_prompts(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """What the model goes on from at validations; raises `ConfigError` for what leaves it no room, or is nothing."""
    prompts = [[*tokenizer.begin_ids, *tokenizer.encode(text)] for text in texts]
    for text, ids in zip(texts, prompts, strict=True):
        if not 0 < len(ids) < context:
            raise ConfigError(
                f"prompts: {text[:40]!r} has {len(ids):,} tokens; for a context of {context:,} it must have at least "
                "1 and leave room for an answer"
            )
    return prompts


def _check_vocabulary(name: str, size: int, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"{name} has {size:,} tokens, the shards were made with a tokenizer of {tokenizer.vocab_size:,}; "
            "shard the data with the model's own tokenizer (arriero shard --tokenizer), or choose another shape"
        )


def seconds_at_peak(shape: LlamaConfig, device: str, dtype: torch.dtype) -> Callable[[Sequence[Batch]], float]:
    """How long a global batch would take at the measured speed of large matrix products: the numerator of `mfu`."""
    peak = matmul_peak(device, dtype)

    def seconds(batches: Sequence[Batch]) -> float:
        flops = 0.0
        for batch in batches:
            lengths = torch.tensor(batch.documents.lengths, dtype=torch.float64)
            context = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())  # causal, within documents
            flops += batch.n_trained * shape.flops_per_token(context)
        return flops / peak

    return seconds


def _bits_per_byte(nats: float, n_bytes: float) -> float | None:
    return nats / math.log(2) / n_bytes if n_bytes else None


@dataclass(frozen=True)
class Validation:
    """Loss and bits per byte on held-out rows, by source where there are several, and what the model says now.

    Bits are over the bytes of the tokens that are measured (data/held_out.py); there are none of a source whose tokens
    have no bytes.
    """

    config: PretrainConfig
    engine: Engine
    tokenizer: Tokenizer
    held_out: Mapping[str, HeldOutRows]
    prompts: Sequence[Sequence[int]]

    def __call__(self) -> dict[str, Any]:
        nats = {name: self._nats(rows) for name, rows in self.held_out.items()}
        loss = sum(nats.values()) / sum(rows.n_tokens for rows in self.held_out.values())
        bits = {name: _bits_per_byte(nats[name], rows.n_bytes) for name, rows in self.held_out.items()}
        whole = _bits_per_byte(sum(nats.values()), sum(rows.n_bytes for rows in self.held_out.values()))
        by_source = {f"bits_per_byte_{name}": value for name, value in bits.items()} if len(bits) > 1 else {}
        return {"loss": loss, "bits_per_byte": whole, **by_source, "samples": self._samples()}

    def _nats(self, rows: HeldOutRows) -> float:
        """Sum of -log p over the rows."""

        def batch(index: int) -> Batch:
            return collate([rows.row(index)], self.config.data.seq_len).to(self.engine.mesh.device)

        totals = self.engine.measure(batch, rows.n_rows, next_token())
        assert totals.counts["loss"] == rows.n_tokens
        return totals.sums["loss"]

    def _samples(self) -> list[str]:
        """Each prompt and how the model goes on."""
        if not self.prompts:
            return []
        shape = self.engine.model.config
        if (model := self.engine.whole_model(lambda: build_model(shape))) is None:
            return []
        with eagerly():
            answers = generate(model, self.tokenizer, self.prompts, SAMPLING, SAMPLE_TOKENS)
        return [text + answer.text for text, answer in zip(self.config.prompts, answers, strict=True)]
