"""A toy model and data for tests of the loop: primes as sizes, dropout on, packing on."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from arriero.checkpoint import native
from arriero.data.sft_loader import SftLoader
from arriero.distributed.engine import Engine
from arriero.distributed.objective import Objective
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.lora import add_lora
from arriero.model.lora_config import LoraConfig
from arriero.train.batches import micro_batches
from arriero.train.config import DataConfig, LoopConfig, OptimConfig, PretrainConfig, SftConfig
from arriero.train.learner import Learner
from arriero.train.loop import Trainer
from arriero.train.metrics import surviving_records
from arriero.train.objectives import next_token

CONFIG = LlamaConfig(dim=44, n_layers=2, n_heads=11, n_kv_heads=11, ffn_dim=29, vocab_size=101, max_context=64)


@dataclass
class ToyData:
    """Forty-one examples of 5 to 23 tokens; each token is its predecessor plus the example's stride."""

    def __post_init__(self):
        rng = np.random.default_rng(3)
        self.lengths = rng.integers(5, 24, size=41)
        strides = rng.integers(1, 5, size=41)
        self._tokens = [
            ((7 * i + strides[i] * np.arange(n)) % 101).astype(np.int32) for i, n in enumerate(self.lengths)
        ]

    def __len__(self):
        return 41

    def tokens(self, i):
        return self._tokens[i]

    def trained(self, i):
        return np.arange(self.lengths[i]) >= 2


def toy_loader(packing: bool = True, seed: int = 5) -> SftLoader:
    """Rows of 53 tokens."""
    return SftLoader(ToyData(), 53, seed, packing)


def toy_trainer(
    run_dir: Path,
    steps: int = 20,
    dropout: float = 0.2,
    packing: bool = True,
    full: bool = False,
    validate=None,
    optim: OptimConfig | None = None,
    **loop,
) -> Trainer:
    """A trainer of an adapter of rank 3 (or all weights), by AdamW at 1e-2 or `optim`; `loop` overrides LoopConfig."""
    loop = LoopConfig(**{"batch_rows": 8, "micro_rows": 2, "precision": "fp32", "seed": 5, "save_every": 5} | loop)
    torch.manual_seed(loop.seed)
    model = Llama(CONFIG).init_weights(std=0.1, seed=1)
    if not full:
        add_lora(model, LoraConfig(rank=3, dropout=dropout))
    loader = toy_loader(packing, loop.seed)
    engine, optim = Engine.alone(model.train()), optim or OptimConfig(lr=1e-2)

    def batches(step: int):
        return micro_batches(loader, step * loop.batch_rows, loop.batch_rows, loop.micro_rows, engine.mesh)

    learner = Learner(engine, next_token(), optim, steps, seed=loop.seed, spike=loop.spike, average=loop.average)
    return Trainer(learner, batches, steps, loop, run_dir, validate)


def sft_settings(model: Path, rows: Path, out: Path, **changes) -> SftConfig:
    """Six steps of an adapter of rank 3 on `rows`, a tenth of them held out; `changes` are other sections whole."""
    config = SftConfig(
        model=str(model),
        out=str(out),
        samples=2,
        data=DataConfig(train=str(rows), validation="0.1", seq_len=128),
        lora=LoraConfig(rank=3),
        optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=6, batch_rows=4, micro_rows=2, precision="fp32"),
    )
    return replace(config, **changes)


def whole_and_resumed(config: PretrainConfig, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the run in directory/whole, and of one in directory/parts that goes on as if killed in step 3."""
    from arriero.train.pretrain import main  # not for every process that imports this module

    whole, parts = (replace(config, out=str(directory / name)) for name in ("whole", "parts"))
    main(whole)
    main(parts)
    saved = native.steps(directory / "parts")
    assert saved == [*range(1, config.loop.steps + 1)], "every step has to be saved"
    for step in saved[2:]:
        shutil.rmtree(native.path_of(directory / "parts", step))
    main(replace(parts, resume=True))
    files = (directory / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    one, two = map(load_file, files)
    return one, two


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> training loss, as metrics.jsonl has it."""
    return {r["step"]: r["loss"] for r in surviving_records(run_dir / "metrics.jsonl") if "event" not in r}


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Names and every bit of every tensor are equal."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def changed(objective: Objective, change: Callable[[Tensor], Tensor]) -> Objective:
    """The objective with `change` of its loss."""
    return replace(objective, sums=lambda model, batch: {"loss": change(objective.sums(model, batch)["loss"])})
