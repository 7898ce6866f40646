"""Training runs of a toy model on any number of processes, which stop and go on from each other's checkpoints.

`python -m helpers.runs RUNS.json` is one process of a group; it does one run after the other, so that the seconds that
a process takes to start are paid once. Under torchrun it is what a user's job is: it resumes by itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from arriero.checkpoint.hf import sidecar_writer
from arriero.distributed.config import ParallelConfig
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh, init_mesh
from arriero.distributed.parallelize import parallelize
from arriero.model.build import empty_model
from arriero.model.config import LlamaConfig
from arriero.model.initial import initial_weight
from arriero.train.batches import micro_batches
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.learner import Learner
from arriero.train.loop import Trainer
from arriero.train.metrics import MetricsLog
from arriero.train.objectives import next_token
from arriero.train.validation import HeldOut, Validation
from helpers.parallel import run_processes
from helpers.tokenizers import small_sentencepiece
from helpers.training import toy_loader

SHAPE = LlamaConfig(dim=36, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=34, vocab_size=106, max_context=64)
BATCH_ROWS = 12  # shared by 1, 2, 3 or 4 processes


@dataclass(frozen=True)
class Run:
    """One run, or a part of it: from the newest checkpoint in `run_dir`, if there is one, up to `stop_at`."""

    run_dir: str
    parallel: dict = field(default_factory=dict)
    steps: int = 20
    stop_at: int = 0
    save_every: int = 1000
    sleep: float = 0.0  # seconds in each step
    timeout: float = 120.0
    optim: dict = field(default_factory=dict)
    at_once: bool = False  # each process's rows in one micro-batch
    tied: bool = False


def make_trainer(run: Run, mesh: Mesh) -> Trainer:
    """All weights are trained, and averaged over the last half; validated on the first rows."""
    shape = replace(SHAPE, tied_embeddings=run.tied)
    values = partial(initial_weight, std=0.1, seed=1)
    engine = Engine(parallelize(empty_model(shape).train(), mesh, values=values), mesh)
    loader = toy_loader()

    def batches(step: int) -> list:
        time.sleep(run.sleep)
        return micro_batches(loader, step * BATCH_ROWS, BATCH_ROWS, micro_rows, mesh)

    micro_rows = BATCH_ROWS // mesh.dp_size if run.at_once else 1
    loop = LoopConfig(
        batch_rows=BATCH_ROWS, micro_rows=micro_rows, precision="fp32", seed=5, save_every=run.save_every, average=0.5
    )

    validate = Validation(engine, {"first": HeldOut(lambda i: loader.collate([loader.row(i)]), 3)})
    sidecars = sidecar_writer(shape, small_sentencepiece())
    optim = OptimConfig(**{"lr": 1e-3} | run.optim)
    learner = Learner(engine, next_token(), optim, run.steps, seed=loop.seed, average=loop.average)
    return Trainer(learner, batches, run.steps, loop, Path(run.run_dir), validate, sidecars)


def do(run: Run, mesh: Mesh) -> Trainer:
    """Resume if there is something to resume; stop at a checkpoint, or go to the end and write final.safetensors."""
    trainer, run_dir = make_trainer(run, mesh), Path(run.run_dir)
    if (saved := trainer.checkpoints.latest()) is not None:
        trainer.restore(saved)
    own = run_dir if mesh.rank == 0 else run_dir / f"process-{mesh.rank}"
    with MetricsLog(own, after=trainer.progress.step) as log:
        if run.stop_at:
            while trainer.progress.step < run.stop_at:
                log.step(trainer.step())
            trainer.measure()  # as a run that saves its best does
            trainer.save()
            trainer.checkpoints.wait()
            return trainer
        outcome = trainer.run(log)
        trainer.load_result(log)
    weights = dict(trainer.learner.engine.dense_tensors())
    if mesh.rank == 0:
        if outcome.interrupted is None:
            save_file({name: t.clone() for name, t in weights.items()}, run_dir / "final.safetensors")
        print("ended", outcome.progress.step, outcome.interrupted and outcome.interrupted.name, flush=True)
    return trainer


def do_alone(run: Run) -> Trainer:
    """In this process."""
    return do(run, Mesh.alone("cpu"))


def do_together(runs: list[Run], world: int, plan: Path, timeout: float = 900) -> str:
    """One after the other, on a group of `world` processes; returns what the first one printed."""
    plan.write_text(json.dumps([asdict(run) for run in runs]))
    return run_processes([sys.executable, "-m", "helpers.runs", str(plan)], world, timeout)


def main(plan: str) -> None:
    """One process of the group."""
    for run in (Run(**values) for values in json.loads(Path(plan).read_text())):
        mesh = init_mesh(ParallelConfig(**run.parallel, timeout=run.timeout), "cpu")
        if mesh.rank == 0:
            (Path(run.run_dir) / "pids").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        (Path(run.run_dir) / "pids" / f"{mesh.rank}.{os.getpid()}").touch()
        do(run, mesh)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
