"""What a run will cost, before it is started: parameters, memory by part, tokens, time by part.

Two ways. By arithmetic, for any known shape, with no weights at hand: exact for weights, adapter, gradients and
optimizer, estimated for activations. By a dry run, where model and data are available: the run is built as usual, and
each of its parts is executed once, in order, in a process of its own: answers, validation, a few micro-batches, an
optimizer step, a checkpoint. Peak memory is measured; time is that of each part, times how often it will be executed.
Of a run that learns from its own answers two whole steps are done: the second one's sampling, scoring and updating,
times the steps, are the forecast (answers that grow longer take longer).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from arriero import settings
from arriero.checkpoint.load import best_device
from arriero.checkpoint.source import resolve
from arriero.distributed.config import ParallelConfig
from arriero.errors import ConfigError, DataError, UserError
from arriero.io.files import json_text, split_lines
from arriero.io.paths import hint
from arriero.io.records import source_files
from arriero.model.catalogue import LADDER, SHAPES, named_shape
from arriero.model.config import LlamaConfig
from arriero.plan.answers import group_tokens, held_parts
from arriero.plan.cost import MOMENTS, Cost, cost, gradients_at_once, kept, moment_bytes
from arriero.show.terminal import log, notes, warn_once
from arriero.train.config import PretrainConfig, SftConfig, TuneConfig
from arriero.train.preference_config import DpoConfig, RewardConfig
from arriero.train.recipes import RECIPES
from arriero.train.rejection_config import RejectionConfig
from arriero.train.rl_config import RlConfig

Planned = SftConfig | PretrainConfig | DpoConfig | RewardConfig | RlConfig

BYTES = {"bf16": 2, "fp32": 4}
PROBED = 3  # micro-batches timed, after one that compiles


@dataclass(frozen=True)
class Plan:
    """The cost of a run. Memory in bytes, time in seconds; None where only a dry run could measure it."""

    parameters: int
    trained: int
    memory: dict[str, int]  # by part, from arithmetic
    tokens: int | None = None  # through the model over the whole run
    steps: int | None = None
    peak: int | None = None  # measured: the process's resident memory, or the GPU's
    seconds: dict[str, float] = field(default_factory=dict)  # by part, measured

    def table(self) -> Table:
        """The plan as people read it."""
        table = Table(title="plan", show_header=False)
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("trained", f"{self.trained:,} ({self.trained / self.parameters:.2%})")
        for part, size in self.memory.items():
            table.add_row(f"memory: {part}", _gb(size))
        table.add_row("memory: sum of parts", _gb(sum(self.memory.values())))
        if self.peak is not None:
            table.add_row("memory: peak, probed", _gb(self.peak))
        if self.tokens is not None:
            table.add_row("tokens", f"{self.tokens:,} in {self.steps:,} steps")
        for part, seconds in self.seconds.items():
            if seconds >= 0.5:
                table.add_row(f"time: {part}", _duration(seconds))
        if self.seconds:
            table.add_row("time: whole run", _duration(sum(self.seconds.values())))
        return table


def plan(config: Planned, console: Console | None = None) -> Plan | Cost:
    """Plan a run: by a dry run where the model and data are here, else by arithmetic from the known shape.

    Where degrees of parallelism are given, the arithmetic is that of each process. Raises what the run itself would
    raise for settings or data it refuses.
    """
    data = config.data.train
    shape = named_shape(config.model)
    if isinstance(config, TuneConfig) and config.model in LADDER and shape is not None:
        raise ConfigError(
            f"{config.model} has no weights to fine-tune; to plan its pretraining: "
            f"arriero plan pretrain-{config.model}" + (f" --data {data}" if data else "")
        )
    if isinstance(config, PretrainConfig) and data and not Path(data).exists():
        raise DataError(
            f"{data}: no such directory of token shards, which `arriero shard` makes; with --data '' a known shape is "
            f"planned by arithmetic{hint(data)}"
        )
    if shape is not None and not data:
        return by_arithmetic(shape, config) if config.parallel == ParallelConfig() else split(shape, config)
    if not data:
        raise ConfigError(
            f"the plan of {config.model!r} needs data to probe with: add --data PATH; without data, plan one of the "
            f"known shapes by arithmetic: {', '.join(SHAPES)}"
        )
    if isinstance(config, RejectionConfig):
        raise ConfigError(
            "a dry run measures one training, and rejection trains once a round on rows that it has yet to sample; "
            "plan without data, or plan the fine-tuning with settings of sft"
        )
    if config.parallel.cpu_offload:
        raise ConfigError("a dry run does not offload; plan cpu_offload by arithmetic: leave --data out")
    if isinstance(config, TuneConfig):  # at once, and not after a process has been started for it
        resolve(config.model)
        source_files(data)
    measured = _dry_run_apart(config, console or notes())
    shape, held = LlamaConfig.from_hf(measured.pop("shape")), measured.pop("held", {})
    found = by_arithmetic(shape, config, measured.pop("longest", None))
    return dataclasses.replace(found, memory=found.memory | held, **measured)


def _dry_run_apart(config: Planned, console: Console) -> dict[str, Any]:
    """What `dry_run` returns, made in a process of its own, whose peak memory is then the run's alone."""
    recipe = next(name for name, cls in RECIPES.items() if type(config) is cls)
    with console.status("dry run: each part of the run, once"), tempfile.TemporaryDirectory() as work:
        file = Path(work) / "config.toml"
        file.write_text(settings.to_toml(dataclasses.replace(config, out=str(Path(work) / "run")), recipe), "utf-8")
        done = subprocess.run([sys.executable, "-m", __name__, str(file)], capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(split_lines(done.stderr.strip())[-1])
    if done.returncode:
        raise RuntimeError(f"the dry run failed:\n{done.stderr}")
    measured = json.loads(split_lines(done.stdout)[-1])
    for warning in measured.pop("warnings"):
        warn_once(warning)
    return dict(measured)


def by_arithmetic(shape: LlamaConfig, config: Planned, longest: int | None = None) -> Plan:
    """Memory by part. Gradients are fp32, of all that is trained at once, or of a block with `in_backward`.

    Activations are the values that `arithmetic.kept` counts a token. longest: tokens of the longest prompt, where
    answers are sampled; None: as many as are allowed.
    """
    config.optim.check_batch(config.loop.batch_rows, config.loop.micro_rows, 1)
    wide = BYTES[config.loop.precision]
    trained, stored, at_once = shape.n_params, 4, gradients_at_once(shape)
    outside = shape.dim + shape.vocab_size * shape.dim * (1 if shape.tied_embeddings else 2)
    lora = isinstance(config, TuneConfig) and config.method == "lora"
    if lora:
        trained, stored, outside = _adapter_size(shape, config), wide, 0
        at_once = trained // shape.n_layers
    optimizer = config.optim.optimizer
    prompt = longest or (config.data.max_prompt if isinstance(config, RlConfig) else 0)
    row = group_tokens(config, prompt) if isinstance(config, RlConfig) else config.data.seq_len
    tokens = config.loop.micro_rows * row
    moments = moment_bytes(optimizer, trained - outside, outside)
    memory = {
        **_weight_bytes(shape, config, stored),
        "trained weights, fp32": trained * 4 if lora else 0,
        "gradients, fp32": 4 * (at_once if config.optim.in_backward else trained),
        MOMENTS[optimizer]: moments,
        "activations (estimate)": tokens
        * kept(shape, ParallelConfig(), shape.n_layers, 1, config.loop.recompute)
        * wide,
        "a chunk of logits, fp32": 0 if isinstance(config, RewardConfig) else 2 * 256 * shape.vocab_size * 4,
    }
    memory = {part: size for part, size in memory.items() if size}
    if isinstance(config, RlConfig):
        native = best_device() == "cpu" and config.quantize == "none"
        memory |= held_parts(shape, config, trained=trained, moments=moments, prompt=prompt, native=native)
    return Plan(shape.n_params, trained, memory)


def _weight_bytes(shape: LlamaConfig, config: Planned, stored: float) -> dict[str, int]:
    """Bytes of the weights by how they are held: those of the blocks' matrices, and the rest."""
    if not isinstance(config, TuneConfig) or config.quantize == "none":
        return {"weights": int(shape.n_params * stored)}
    matrices = {name: shape.n_layers * out * width for name, (out, width) in matrix_shapes(shape).items()}
    bits = {"int8": 8, "nf4": 4 + 32 / 64}[config.quantize]  # and int8's scale of a row, which is next to nothing
    n = sum(matrices.values())
    return {
        f"matrices of the blocks, {config.quantize}": int(n * bits / 8),
        "a matrix while it is used": int(max(out * width for out, width in matrix_shapes(shape).values()) * stored),
        "other weights": int((shape.n_params - n) * stored),
    }


def split(shape: LlamaConfig, config: Planned) -> Cost:
    """What each process holds and sends when all weights are trained, split by `config.parallel`."""
    if isinstance(config, RlConfig):
        raise ConfigError(
            "the plan of a split counts one training of rows; answers that are sampled, and a value model, are planned "
            "for one process: leave the degrees of parallelism out"
        )
    if isinstance(config, TuneConfig) and config.method == "lora":
        raise ConfigError("the plan of a split counts the training of all weights; add --method full")
    p, loop = config.parallel, config.loop
    fitted = p if p.dp_shard > 0 else p.fitted(p.dp_replicate * p.tp * p.cp * p.pp)
    config.optim.check_batch(loop.batch_rows, loop.micro_rows, fitted.dp)
    return cost(
        shape,
        fitted,
        seq_len=config.data.seq_len,
        batch_rows=loop.batch_rows,
        micro_rows=loop.micro_rows,
        recompute=loop.recompute,
        optimizer=config.optim.optimizer,
        in_backward=config.optim.in_backward,
    )


def matrix_shapes(shape: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a block's matrices."""
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    return {
        "q_proj": (q, shape.dim),
        "k_proj": (kv, shape.dim),
        "v_proj": (kv, shape.dim),
        "o_proj": (shape.dim, q),
        "gate_proj": (shape.ffn_dim, shape.dim),
        "up_proj": (shape.ffn_dim, shape.dim),
        "down_proj": (shape.dim, shape.ffn_dim),
    }


def _adapter_size(shape: LlamaConfig, config: Any) -> int:
    adapted = [sum(widths) for name, widths in matrix_shapes(shape).items() if config.lora.matches(name)]
    return shape.n_layers * config.lora.rank * sum(adapted)


def dry_run(recipe: str, config: Any) -> dict[str, Any]:
    """Build the run and execute each of its parts once, in order; returns what the whole run will take."""
    from arriero.train.metrics import memory_bytes

    build = importlib.import_module(f"arriero.train.{recipe}").build
    run, loading = _timed(lambda: build(config, Console(quiet=True)))
    trainer, loop = run.trainer, config.loop
    Path(config.out).mkdir(parents=True, exist_ok=True)
    own = isinstance(config, RlConfig)
    asked = "the reference's log-probabilities too" if isinstance(config, DpoConfig) else ""
    seconds = {"loading" if own else "loading and tokenising" + (f", {asked}" if asked else ""): loading}
    tenth = math.ceil(trainer.total_steps / 10)
    if trainer.validate is not None:
        validations = 1 + math.ceil(trainer.total_steps / (trainer.loop.validate_every or tenth))
        share = _some_held_out(run) if own else 1.0
        seconds["validation"] = validations * _timed(trainer.measure)[1] / share
    seconds["answers before and after"] = 2 * _timed(lambda: run.sample("before"))[1]
    seconds |= _own_answers(trainer) if own else _steps(run, config)
    saves = math.ceil(trainer.total_steps / (loop.save_every or tenth))
    seconds["checkpoints"] = (saves + 1) * _timed(trainer.save)[1]  # and the result, which is no larger
    run.sample("after")
    held = {}
    if own:
        prepared = run.prepared
        held = {"held": {"KV cache": prepared.rollouts.sampler.memory["cache"]}, "longest": prepared.prompts.longest}
    return {
        **held,
        "shape": trainer.learner.engine.model.config.to_hf(),
        "steps": trainer.total_steps,
        "tokens": run.total_tokens,
        "peak": memory_bytes(),
        "seconds": seconds,
    }


def _steps(run: Any, config: Any) -> dict[str, float]:
    """Seconds of all steps of a run that learns from rows: what makes its batches, and its micro-batches."""
    trainer, learner = run.trainer, run.trainer.learner
    made = [_timed(lambda step=step: trainer.batches(step)[0]) for step in range(PROBED + 1)]  # type: ignore[misc]
    times = [_timed(lambda batch=batch: _micro_batch(learner, batch))[1] for batch, _ in made]  # type: ignore[misc]
    steady = median(times[1:]) / (config.loop.micro_rows * config.data.seq_len)  # seconds a token
    optimizer = min(_timed(learner.optimizer.step)[1] for _ in range(2)) + median(waited for _, waited in made[1:])
    learner.optimizer.zero_grad()
    return {
        "steps": steady * run.total_tokens + optimizer * trainer.total_steps,
        "compiling": max(0.0, times[0] - median(times[1:])),
    }


def _some_held_out(run: Any) -> float:
    """Has a validation ask only as many held-out prompts as are answered at a time; returns their share of all."""
    of = run.held_out.of
    some = of.held_out[: math.ceil(of.config.rollout.at_once / of.config.rollout.validation_answers)]
    run.held_out.of = dataclasses.replace(of, held_out=some)
    return len(some) / len(of.held_out)


def _own_answers(trainer: Any) -> dict[str, float]:
    """Seconds of all steps of a run that learns from its own answers, by part, from two of them."""
    found = []
    for _ in range(2):
        metrics, whole = _timed(trainer.step)
        sampled, scored = metrics["sampling_seconds"], metrics["scoring_seconds"]
        found.append({"sampling": sampled, "scoring": scored, "updates": whole - sampled - scored})
    first, second = found
    return {part: first[part] + (trainer.total_steps - 1) * second[part] for part in first}


def _micro_batch(learner: Any, batch: Any) -> None:
    learner.engine.forward_backward([batch], learner.objective)


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What `action` returns, and the seconds it took."""
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _duration(seconds: float) -> str:
    from arriero.train.metrics import duration

    return duration(seconds)


class _Warnings(logging.Handler):
    """Keeps the warnings of the dry run, which the process that makes the plan prints."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    log.addHandler(warned := _Warnings())
    try:
        print(json_text(dry_run(*settings.load_recipe(RECIPES, sys.argv[1])) | {"warnings": warned.messages}))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
