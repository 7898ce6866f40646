"""What a training run is told: frozen dataclasses that fail on construction, before any model is loaded.

The loop's settings are shared by every recipe; a recipe adds what only it knows. No torch here: the command
line reads this module to print its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from arriero.distributed.config import ParallelConfig
from arriero.errors import check
from arriero.io.paths import PathText
from arriero.model.lora_config import LoraConfig
from arriero.settings import settle

LONGEST_ROW = 2**24  # tokens
ROW_RULE = f"it must be from 8 to {LONGEST_ROW:,}"


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw (arXiv 1711.05101); adamw8bit keeps its moments of matrices in a quarter of the memory (2110.02861); muon
    (2502.16982) is for the matrices of blocks, with adamw on embeddings, head and norms."""
    lr: float = 2e-4
    """Peak learning rate. LoRA likes about ten times what full fine-tuning does; muon's updates have adamw's size."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warmup: cosine or linear down to min_lr; wsd holds, then falls linearly over the last decay share."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly from zero; 1 or more is a number of steps."""
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
    in_backward: bool = False
    """Step each parameter in the backward pass, as soon as its gradient is there, and drop the gradient, so that they
    never lie in memory together. Needs clip 0, and batches that go through the model at once."""

    def __post_init__(self) -> None:
        check(0 < self.lr < math.inf, f"lr is {self.lr}; it must be a number above 0")
        check(all(0 <= b < 1 for b in self.betas), f"betas are {self.betas}; each is in [0, 1)")
        check(
            0 < self.eps < math.inf,
            f"eps is {self.eps}; it must be a number above 0 (a gradient of 0 is divided by it)",
        )
        check(
            0 <= self.warmup < 1 or (self.warmup > 0 and self.warmup % 1 == 0),
            f"warmup is {self.warmup}; it is a share of the steps, in [0, 1), or a whole number of steps",
        )
        check(0 <= self.min_lr <= 1, f"min_lr is {self.min_lr}; it is a share of the peak, in [0, 1]")
        check(0 < self.decay <= 1, f"decay is {self.decay}; it is a share of the steps, in (0, 1]")
        check(0 <= self.clip < math.inf, f"clip is {self.clip}; it must be at least 0 (0 switches clipping off)")
        check(0 <= self.weight_decay < math.inf, f"weight_decay is {self.weight_decay}; it must be at least 0")
        check(
            not self.in_backward or self.clip == 0,
            f"in_backward is on and clip is {self.clip}; clipping needs the norm of the whole gradient before any "
            "parameter is stepped: set clip to 0, or leave in_backward off",
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """What `build_optimizer` is told."""
        values = {name: getattr(self, name) for name in ("lr", "betas", "eps", "weight_decay")}
        return {"name": self.optimizer, **values}

    def check_batch(self, batch_rows: int, micro_rows: int, dp: int) -> None:
        """Raise `ConfigError` where the batches of `dp` data-parallel processes cannot be stepped in the backward."""
        check(
            not self.in_backward or batch_rows == micro_rows * dp,
            f"in_backward is on, but batch_rows {batch_rows} is not micro_rows {micro_rows} x {dp} data-parallel "
            "processes; a gradient summed over several micro-batches has to be kept: set batch_rows to that product, "
            "or leave in_backward off",
        )


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
    recompute: Literal["none", "full", "selective"] = "none"
    """What a block computes again in the backward pass to save memory: full is all of it (a third more time), selective
    all but matmuls and attention."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block (about half a minute once); auto does so when the run is long enough to gain by it."""
    seed: int = 0
    """Decides data order, dropout and initial adapter weights."""
    log_every: int = 1
    """Optimizer steps between lines of metrics."""
    validate_every: int = 0
    """Optimizer steps between validations; 0 means ten times a run (fewer in a short pretraining, of which they would
    take more than a tenth)."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 means ten times a run."""
    keep_last: int = 2
    """Newest checkpoints kept beside the best."""
    max_skipped: int = 10
    """Steps in a row with a non-finite loss or gradient (each is skipped and counted) before training stops."""
    spike: float = 0.0
    """Standard deviations above its running mean at which a loss or gradient norm is a spike: that step is skipped and
    counted; 0 skips none (usual: 5 to 8)."""
    average: float = 0.0
    """Share of the steps, at the end, over which the weights are averaged for the result; 0 takes the last ones."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl (extra 'track')."""

    def __post_init__(self) -> None:
        check(self.steps >= 0, f"steps is {self.steps}; it must be at least 0 (0 takes them from epochs)")
        check(self.epochs < math.inf, f"epochs is {self.epochs}; it must be a finite number")
        check(self.steps > 0 or self.epochs > 0, f"epochs is {self.epochs} and steps 0; one must be above 0")
        check(self.batch_rows >= 1, f"batch_rows is {self.batch_rows}; it must be at least 1")
        check(
            self.micro_rows >= 1 and self.batch_rows % self.micro_rows == 0,
            f"batch_rows {self.batch_rows} is not a multiple of micro_rows {self.micro_rows}; change one of them",
        )
        for name in ("log_every", "keep_last", "max_skipped"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validate_every", "save_every"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")
        check(
            self.spike == 0 or 1 <= self.spike < math.inf,
            f"spike is {self.spike}; it must be 0, or at least 1: nearer to the mean is every other step",
        )
        check(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be a whole number from 0 to below 2**63")
        check(0 <= self.average < 1, f"average is {self.average}; it is a share of the steps, in [0, 1)")


def check_together(optim: OptimConfig, loop: LoopConfig, parallel: ParallelConfig) -> None:
    """Raise `ConfigError` where settings of an optimizer exclude others."""
    check(
        not optim.in_backward or loop.spike == 0,
        f"in_backward is on and spike is {loop.spike}; a spike shows after the backward pass, which has stepped then: "
        "set spike to 0, or leave in_backward off",
    )
    check(
        not optim.in_backward or parallel.pp == 1,
        f"in_backward is on and pp is {parallel.pp}; a pipeline sums gradients over micro-batches: "
        "leave in_backward off",
    )
    check(
        optim.optimizer != "adamw8bit" or parallel.tp == 1,
        f"optimizer is adamw8bit and tp is {parallel.tp}; 256 values of a row share a scale, and tp cuts rows: "
        "take adamw, or dp_shard instead of tp",
    )


@dataclass(frozen=True)
class DataConfig:
    """What is learned from, and how it is laid into rows."""

    train: PathText = ""
    """Training data: a file (JSONL, JSON, CSV, Parquet), a directory of them, or a Hub data set id."""
    validation: PathText = "0.05"
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
        check(8 <= self.seq_len <= LONGEST_ROW, f"seq_len is {self.seq_len}; {ROW_RULE}")
        check(0 <= self.max_truncated <= 1, f"max_truncated is {self.max_truncated}; it is a share, in [0, 1]")
        check(self.workers >= 0, f"workers is {self.workers}; it must be at least 0 (0: one per core)")


@dataclass(frozen=True)
class TuneConfig:
    """What every recipe is told that goes on from a model; each adds what only it knows."""

    model: PathText = ""
    """A directory, a .gguf file, a Hub id, or a built-in name."""
    out: PathText = "out/tuned"
    """Run directory: config, metrics, checkpoints, report, and the trained adapter or model."""
    method: Literal["lora", "full"] = "lora"
    """Train a low-rank adapter, or every weight."""
    adapter: PathText = ""
    """An adapter (PEFT's layout) on the model to go on with, by method lora; its rank, scale and targets hold, not
    those given here. Empty begins a new one."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the frozen matrices under an adapter in 8 or 4.5 bits a weight (QLoRA, arXiv 2305.14314), for less memory
    and more time. Embeddings, head and norms stay as they are."""
    chat_template: PathText = ""
    """A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file, which is saved
    with the result and used with it from then on; empty takes the model's own."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the run directory."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        settle(self)
        check(
            self.quantize == "none" or self.method == "lora",
            f"quantize is {self.quantize} and method {self.method}; only frozen weights are held in few bits: take "
            "method lora, or leave quantize out",
        )
        check(
            not self.adapter or self.method == "lora",
            f"adapter is {self.adapter} and method {self.method}; to train every weight from there, merge it first "
            "(arriero merge) and name the merged model",
        )
        check(
            self.quantize == "none" or self.parallel.tp == 1,
            f"quantize is {self.quantize} and tp is {self.parallel.tp}; a quantised matrix is whole on each process: "
            "take dp_shard or dp_replicate instead of tp",
        )
        check_together(self.optim, self.loop, self.parallel)


@dataclass(frozen=True)
class SftConfig(TuneConfig):
    """Supervised fine-tuning: the model learns the assistant's turns of the conversations in a file."""

    out: PathText = "out/sft"
    """Run directory: config, metrics, checkpoints, report, and the trained adapter or model."""
    samples: int = 8
    """Validation prompts answered before and after training, for the report; 0 for none."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.samples >= 0, f"samples is {self.samples}; it must be at least 0")


@dataclass(frozen=True)
class DistillConfig(SftConfig):
    """Knowledge distillation: supervised fine-tuning towards a larger model's probabilities as well as the answers."""

    out: PathText = "out/distill"
    """Run directory: config, metrics, checkpoints, report, and the trained adapter or model."""
    teacher: PathText = ""
    """The model to learn from, of the same tokenizer: a directory, a .gguf file, a Hub id, or a built-in name."""
    share: float = 0.5
    """Share of the divergence from the teacher in the loss; the rest is cross-entropy (torchtune's kd_ratio)."""
    divergence: Literal["forward", "reverse", "symmetric"] = "forward"
    """forward, KL(teacher || student), covers all that the teacher would say; reverse keeps to what the teacher finds
    likely; symmetric is their mean."""
    top_k: int = 32
    """Most probable tokens of the teacher that are kept, 8 bytes each on disk; all others are compared as one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.share <= 1, f"share is {self.share}; it must be above 0 and at most 1 (0: use arriero sft)")
        check(self.top_k >= 1, f"top_k is {self.top_k}; it must be at least 1 (usual: 16 to 128)")
        check(
            self.parallel.tp == 1,
            f"tp is {self.parallel.tp}; distillation reads whole rows of logits: take dp_shard or cp instead of tp",
        )


@dataclass(frozen=True)
class PretrainDataConfig:
    """Token shards, as `arriero shard` writes them, and how they are laid into rows."""

    train: PathText = ""
    """Directory that `arriero shard` wrote, or any directory of shards: one set, or one below it for each source."""
    validation: PathText = ""
    """Directory of shards to validate on; empty takes what `arriero shard` held out, if it did."""
    validation_tokens: int = 100_000
    """Tokens of it that are measured each time."""
    seq_len: int = 1024
    """Tokens in a row."""
    packing: Literal["best-fit", "concat"] = "best-fit"
    """Whole documents laid side by side, each attending to itself only; or one endless text, as Llama 1 and 2 had."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source in the rows; empty gives each its share of all tokens."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """Passes over a source after which the others take its share; unnamed sources may repeat for ever."""

    def __post_init__(self) -> None:
        check(8 <= self.seq_len <= LONGEST_ROW, f"seq_len is {self.seq_len}; {ROW_RULE}")
        check(
            self.validation_tokens >= self.seq_len,
            f"validation_tokens is {self.validation_tokens}; it must hold a row of seq_len {self.seq_len}",
        )
        for name in ("weights", "max_epochs"):
            for source, value in getattr(self, name).items():
                check(0 <= value < math.inf, f"{name}: {source} is {value}; it must be a number of at least 0")


@dataclass(frozen=True)
class TrainingStage:
    """A change in the middle of a run: what is not given stays as it was in the stage before."""

    start: float = 0.0
    """Share of the steps after which it begins."""
    batch_rows: int = 0
    """Rows in the global batch from here on; 0 keeps them."""
    seq_len: int = 0
    """Tokens in a row from here on; 0 keeps them."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source from here on (annealing, up-weighting); empty keeps them."""

    def __post_init__(self) -> None:
        check(0 < self.start < 1, f"stage: start is {self.start}; it is a share of the steps, in (0, 1)")
        check(self.batch_rows >= 0, f"stage: batch_rows is {self.batch_rows}; it must be at least 0")
        check(self.seq_len == 0 or 8 <= self.seq_len <= LONGEST_ROW, f"stage: seq_len is {self.seq_len}; {ROW_RULE}")


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining: a Llama learns to continue text."""

    model: PathText = ""
    """A shape (`arriero ls models`), from random weights, or a model to go on with: a directory, .gguf or Hub id."""
    out: PathText = "out/pretrain"
    """Run directory: config, metrics, checkpoints, report, and the model."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the run directory."""
    tokens: float = 0.0
    """Tokens to train on; 0 takes steps or epochs."""
    rope_theta: float = 0.0
    """RoPE's base, for a model that goes on at a longer context; 0 keeps the model's (Llama 3: 5e5)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition, which keeps logits small (PaLM and OLMo 2: 1e-4 and 1e-5)."""
    prompts: tuple[str, ...] = ("The", "Once upon a time", "def ")
    """Texts that the model continues at every validation, for the report."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=6e-4, weight_decay=0.1, schedule="wsd", min_lr=0.0)
    )
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    stages: tuple[TrainingStage, ...] = ()
    """Changes of batch, row length or mixture during the run, in order of their start."""

    def __post_init__(self) -> None:
        settle(self)
        check(
            self.rope_theta == 0 or 1 < self.rope_theta < math.inf,
            f"rope_theta is {self.rope_theta}; it must be above 1 (Llama 3: 5e5), or 0 for the model's own",
        )
        for name in ("tokens", "z_loss"):
            check(0 <= getattr(self, name) < math.inf, f"{name} is {getattr(self, name)}; it must be at least 0")
        check(
            not (self.tokens and self.loop.steps),
            f"tokens is {self.tokens:g} and steps is {self.loop.steps}; a run has one length: set the other to 0",
        )
        check_together(self.optim, self.loop, self.parallel)
        starts = [stage.start for stage in self.stages]
        check(starts == sorted(set(starts)), f"stages start at {starts}; they must be in ascending order")
        for stage in self.stages:
            check(
                stage.batch_rows % self.loop.micro_rows == 0,
                f"stage at {stage.start}: batch_rows {stage.batch_rows} is not a multiple of micro_rows "
                f"{self.loop.micro_rows}; change one of them",
            )
            check(
                not self.optim.in_backward or stage.batch_rows in (0, self.loop.batch_rows),
                f"stage at {stage.start}: batch_rows {stage.batch_rows}, but in_backward is on, for which every batch "
                "goes through the model at once: leave batch_rows or in_backward out",
            )
