"""What a run will cost, before it is started: parameters, memory by part, tokens, time.

Two ways. By arithmetic, for any published size, with no weights at hand: exact for weights, adapter, gradients and
optimizer, estimated for activations. By a probe, for a model that is here: the run is built as it would be, a few
micro-batches and one optimizer step are done in a process of their own, and peak memory and time are what that took.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from arriero import config as configs
from arriero.errors import ConfigError, UserError
from arriero.model.config import LINEARS, PUBLISHED, LlamaConfig
from arriero.train.config import SftConfig

BYTES = {"bf16": 2, "fp32": 4}
PROBED = 3  # micro-batches timed, after one that compiles


@dataclass(frozen=True)
class Plan:
    """The cost of a run. Memory in bytes, time in seconds; None where only a probe could tell."""

    parameters: int
    trained: int
    memory: dict[str, int]  # by part, from arithmetic
    tokens: int | None = None  # through the model over the whole run
    steps: int | None = None
    peak: int | None = None  # measured: the process's resident memory, or the GPU's
    seconds: float | None = None

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
        if self.seconds is not None:
            table.add_row("time, probed", _duration(self.seconds))
        return table


def plan(config: SftConfig, console: Console | None = None) -> Plan:
    """Plan a run: by a probe where the model and data are here, else by arithmetic from the published size.

    Raises what the run itself would raise for settings or data it refuses.
    """
    if config.model in PUBLISHED and not config.data.train:
        return by_arithmetic(PUBLISHED[config.model], config)
    if not config.data.train:
        raise ConfigError(
            f"the plan of {config.model!r} needs data to probe with: add --data FILE; without data, plan one of the "
            f"published sizes by arithmetic: {', '.join(PUBLISHED)}"
        )
    console = console or Console(stderr=True)
    with console.status("probing: loading, tokenising, and a few micro-batches"), tempfile.TemporaryDirectory() as work:
        file = Path(work) / "config.toml"
        file.write_text(configs.to_toml(dataclasses.replace(config, out=str(Path(work) / "run")), "sft"), "utf-8")
        # A process of its own: its peak is the run's, not that of whatever called this.
        done = subprocess.run([sys.executable, "-m", __name__, str(file)], capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"the probe failed:\n{done.stderr}")
    probed = json.loads(done.stdout.splitlines()[-1])
    shape = LlamaConfig.from_hf(probed.pop("shape"))
    return dataclasses.replace(by_arithmetic(shape, config), **probed)


def by_arithmetic(shape: LlamaConfig, config: SftConfig) -> Plan:
    """Memory by part. AdamW keeps two fp32 moments of what is trained; gradients are fp32 too.

    Activations, per token and block, values kept for the backward pass: 6 of the model's width D (two norms' inputs and
    outputs, attention's output, the residual), q, k, v, and 3 of the feed-forward's F; with recomputation D only.
    """
    wide = BYTES[config.loop.precision]
    trained, stored = shape.n_params, 4
    if config.method == "lora":
        trained, stored = _adapter_size(shape, config), wide
    heads = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    kept = shape.dim if config.loop.recompute == "full" else 6 * shape.dim + heads + 3 * shape.ffn_dim
    tokens = config.loop.micro_rows * config.data.seq_len
    memory = {
        "weights": shape.n_params * stored,
        "trained weights, fp32": trained * 4 if config.method == "lora" else 0,
        "gradients, fp32": trained * 4,
        "AdamW's moments, fp32": trained * 8,
        "activations (estimate)": tokens * kept * shape.n_layers * wide,
        "a chunk of logits, fp32": 2 * 256 * shape.vocab_size * 4,
    }
    return Plan(shape.n_params, trained, {part: size for part, size in memory.items() if size})


def _adapter_size(shape: LlamaConfig, config: SftConfig) -> int:
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    widths = {
        "q_proj": (shape.dim, q),
        "k_proj": (shape.dim, kv),
        "v_proj": (shape.dim, kv),
        "o_proj": (q, shape.dim),
        "gate_proj": (shape.dim, shape.ffn_dim),
        "up_proj": (shape.dim, shape.ffn_dim),
        "down_proj": (shape.ffn_dim, shape.dim),
    }
    adapted = [name for name in LINEARS if config.lora.matches(name)]
    return shape.n_layers * config.lora.rank * sum(sum(widths[name]) for name in adapted)


def probe(config: SftConfig) -> dict[str, Any]:
    """Build the run, do PROBED micro-batches, an optimizer step and a validation row; what the whole will take."""
    from arriero.train.metrics import memory_bytes
    from arriero.train.sft import build

    began = time.perf_counter()
    run = build(config, Console(quiet=True))
    trainer = run.trainer
    batches = [trainer.batches(step)[0] for step in range(PROBED + 1)]
    times = []
    for batch in batches:
        start = time.perf_counter()
        (trainer.objective(run.model, batch) / max(batch.n_trained, 1)).backward()
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            until_first = time.perf_counter() - began
    micro = sorted(times[1:])[PROBED // 2]
    loop = config.loop
    # What loading, tokenising and compiling took, and then the micro-batches.
    seconds = until_first - micro + micro * trainer.total_steps * loop.batch_rows // loop.micro_rows
    if trainer.validate is not None:
        tenth = math.ceil(trainer.total_steps / 10)
        validations = 1 + math.ceil(trainer.total_steps / (loop.validate_every or tenth))
        start = time.perf_counter()
        trainer.engine.train(False)
        trainer.validate()
        seconds += validations * (time.perf_counter() - start)
    return {
        "shape": run.model.config.to_hf(),
        "steps": trainer.total_steps,
        "tokens": trainer.total_steps * loop.batch_rows * config.data.seq_len,
        "peak": memory_bytes(),
        "seconds": seconds,
    }


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _duration(seconds: float) -> str:
    from arriero.train.metrics import duration

    return duration(seconds)


if __name__ == "__main__":
    try:
        print(json.dumps(probe(configs.load_recipe({"sft": SftConfig}, sys.argv[1])[1])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
