"""What a training run is told: frozen dataclasses that fail on construction, before any model is loaded.

The loop's settings are shared by every recipe; a recipe adds what only it knows. No torch here: the command
line reads this module to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from arriero.errors import ConfigError
from arriero.model.config import LoraConfig


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) and its learning-rate schedule."""

    lr: float = 2e-4
    """Peak learning rate. LoRA likes about ten times what full fine-tuning does."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warmup: cosine or linear down to min_lr; wsd holds, then falls linearly over the last decay share."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly from zero."""
    min_lr: float = 0.1
    """Final learning rate, as a share of the peak."""
    decay: float = 0.2
    """Share of the steps in which wsd falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; norms are never decayed."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"lr is {self.lr}; it must be above 0")
        _require(0 <= self.warmup < 1, f"warmup is {self.warmup}; it is a share of the steps, in [0, 1)")
        _require(0 <= self.min_lr <= 1, f"min_lr is {self.min_lr}; it is a share of the peak, in [0, 1]")
        _require(0 < self.decay <= 1, f"decay is {self.decay}; it is a share of the steps, in (0, 1]")
        _require(self.clip >= 0, f"clip is {self.clip}; it must be at least 0 (0 switches clipping off)")
        _require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must be at least 0")


@dataclass(frozen=True)
class LoopConfig:
    """How long, in what batches, and what is kept: the same for every recipe."""

    steps: int = 0
    """Optimizer steps; 0 takes them from epochs."""
    epochs: float = 1.0
    """Passes over the training rows, when steps is 0."""
    batch_rows: int = 8
    """Packed rows in the global batch of one optimizer step."""
    micro_rows: int = 1
    """Packed rows that go through the model at once; batch_rows is accumulated from these."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and matmuls. Trained weights, optimizer, norms, softmax and loss are fp32 in both."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block (about half a minute once); auto does so when the run is long enough to gain by it."""
    seed: int = 0
    """Decides data order, dropout and initial adapter weights."""
    log_every: int = 1
    """Optimizer steps between lines of metrics."""
    validate_every: int = 0
    """Optimizer steps between validations; 0 means ten times a run."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 means ten times a run."""
    keep_last: int = 2
    """Newest checkpoints kept beside the best."""
    max_skipped: int = 10
    """Steps in a row with a non-finite loss or gradient (each is skipped and counted) before training stops."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl (extra 'track')."""

    def __post_init__(self) -> None:
        _require(self.steps >= 0, f"steps is {self.steps}; it must be at least 0 (0 takes them from epochs)")
        _require(self.steps > 0 or self.epochs > 0, f"epochs is {self.epochs} and steps 0; one must be above 0")
        _require(self.batch_rows >= 1, f"batch_rows is {self.batch_rows}; it must be at least 1")
        _require(
            self.micro_rows >= 1 and self.batch_rows % self.micro_rows == 0,
            f"batch_rows {self.batch_rows} is not a multiple of micro_rows {self.micro_rows}; change one of them",
        )
        for name in ("log_every", "keep_last", "max_skipped"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validate_every", "save_every"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")


@dataclass(frozen=True)
class DataConfig:
    """What is learned from, and how it is laid into rows."""

    train: str = ""
    """Training data: a file (JSONL, JSON, CSV, Parquet), a directory of them, or a Hub data set id."""
    validation: str = "0.05"
    """A file, or the share of the training rows to hold out; 0 validates on nothing."""
    seq_len: int = 2048
    """Tokens in a packed row, and the longest example."""
    packing: bool = True
    """Lay several examples in one row, each attending to itself only."""
    max_truncated: float = 0.05
    """Largest share of examples longer than seq_len that is tolerated (they are left out); above it, an error."""
    workers: int = 0
    """Tokenising processes; 0 means one per core."""

    def __post_init__(self) -> None:
        _require(self.seq_len >= 8, f"seq_len is {self.seq_len}; it must be at least 8")
        _require(0 <= self.max_truncated <= 1, f"max_truncated is {self.max_truncated}; it is a share, in [0, 1]")
        _require(self.workers >= 0, f"workers is {self.workers}; it must be at least 0 (0: one per core)")


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning: the model learns the assistant's turns of the conversations in a file."""

    model: str = ""
    """A directory, a .gguf file, a Hub id, or a built-in name."""
    out: str = "out/sft"
    """Run directory: config, metrics, checkpoints, report, and the trained adapter or model."""
    method: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter, or every weight."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the run directory."""
    samples: int = 8
    """Validation prompts answered before and after training, for the report; 0 for none."""
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        _require(self.samples >= 0, f"samples is {self.samples}; it must be at least 0")
