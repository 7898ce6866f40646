"""Trains a toy model under some parallelism and records what came of it; several processes are started for that.

`python -m helpers.parallel CASES.json OUT` is one process of a group. It runs one case after the other, so that the
seconds that a process takes to start are paid once. `run_cases` starts the group and sees to its end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from arriero.data.batch import IGNORED, Batch, Row, collate, next_token_targets
from arriero.distributed.config import ParallelConfig
from arriero.distributed.engine import Engine
from arriero.distributed.gather import gathered, source_of
from arriero.distributed.mesh import Mesh, init_mesh
from arriero.distributed.objective import Objective
from arriero.distributed.parallelize import parallelize
from arriero.losses.lm import token_logprobs
from arriero.model.build import build_model
from arriero.model.config import LlamaConfig, Qwen3Config
from arriero.model.initial import initial_adapter, initial_weight, whole
from arriero.model.llama import Llama
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.model.quantized import quantize_linears
from arriero.optim.build import decay_groups
from arriero.train.objectives import next_token
from helpers.objectives import mixed, mixed_row

SHAPE = LlamaConfig(22, 5, 6, 2, 34, 106, 64, head_dim=10)
STEPS = 10
MICRO_BATCHES = 8  # of a global batch
PARTS = ("first", "last", "weights")  # of a result: tensors by name


@dataclass(frozen=True)
class Case:
    """One way to train the toy model."""

    parallel: dict = field(default_factory=dict)
    lora: bool = False
    tied: bool = False
    qk_norm: bool = False
    prefix: int = 0
    recompute: str = "none"
    compile: bool = False
    dtype: str = "float32"
    dropout: float = 0.0
    micro_batches: int = MICRO_BATCHES
    mixed: bool = False  # an objective with several denominators
    quantize: str = ""  # how the base under an adapter is held

    def name(self) -> str:
        """As a file may be called."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return json.dumps(changed | {"parallel": self.parallel}, sort_keys=True).translate(
            {ord(c): "-" for c in ' {}":,'}
        )

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return mixed() if self.mixed else next_token()

    def batch(self, seed: int) -> Batch:
        """A micro-batch."""
        return collate([mixed_row(seed, SHAPE.vocab_size)]) if self.mixed else toy_batch(seed, self.prefix)

    def alone(self) -> Case:
        """The same on one process."""
        return dataclasses.replace(self, parallel={}, recompute="none", compile=False)


@dataclass(frozen=True)
class Result:
    """What training came to; `first` and `last` hold each trained tensor's gradient, `weights` the whole model."""

    losses: list[float]
    norms: list[float]
    validation: float
    logprobs: torch.Tensor  # of the tokens of some batches, which process 0 asked for
    reference: torch.Tensor  # the same without the adapter
    first: dict[str, torch.Tensor]
    last: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def toy_batch(seed: int, prefix: int = 0) -> Batch:
    """Three documents of 2 to 23 tokens, some of them untrained, behind a shared beginning of `prefix` tokens."""
    rng = np.random.default_rng(seed)
    lead = np.random.default_rng(7).integers(0, SHAPE.vocab_size, prefix).astype(np.int32)
    behind = Row(lead, np.full(prefix, IGNORED), np.array([prefix])) if prefix else None
    rows = []
    for length in rng.integers(2, 24, 3):
        tokens = rng.integers(0, SHAPE.vocab_size, length).astype(np.int32)
        rows.append(Row(tokens, next_token_targets(tokens, rng.random(length) < 0.7), np.array([length])))
    return collate(rows, behind=behind)


def toy_model(case: Case) -> Llama:
    """The model whole, as one process makes it; on the meta device without values."""
    shape = dataclasses.replace(SHAPE, tied_embeddings=case.tied)
    model = build_model(Qwen3Config(**vars(shape)) if case.qk_norm else shape)
    if model.device.type != "meta":
        model.init_weights(std=0.1, seed=1)
    if case.lora:
        if case.quantize:
            quantize_linears(model, case.quantize)
        add_lora(model, LoraConfig(rank=3, dropout=case.dropout), seed=2)
        for name, p in lora_state(model).items():
            if ".lora_B." in name and not p.is_meta:
                p.data.copy_(toy_values(name, p.shape, whole(p.shape)))
    return model.set_compute_dtype(getattr(torch, case.dtype)).train()


def toy_values(name: str, shape: Sequence[int], box: tuple[slice, ...]) -> torch.Tensor:
    """The same values, for processes that hold a part. B is zero in life, and then A has no gradient at first."""
    if ".lora_A." in name:
        return initial_adapter(name, shape, box, seed=2)
    return initial_weight(name, shape, box, seed=1, std=0.05 if ".lora_B." in name else 0.1)


def train(case: Case, mesh: Mesh) -> Result:
    """STEPS steps; what is returned is whole on process 0."""
    with torch.device("meta" if mesh.distributed else "cpu"):
        model = toy_model(case)
    values = toy_values if mesh.distributed else None
    engine = Engine(parallelize(model, mesh, values=values, recompute=case.recompute, compile=case.compile), mesh)
    optimizer = torch.optim.AdamW(
        decay_groups(engine.parameters, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, fused=True
    )
    losses, norms, grads = [], [], []
    for step in range(STEPS):
        seeds = [step * case.micro_batches + i for i in mesh.local_shard(case.micro_batches)]
        share = [case.batch(seed) for seed in seeds]
        losses.append(engine.forward_backward(share, case.objective, seeds).loss)
        if step in (0, STEPS - 1):
            grads.append(gradients(engine))
        norms.append(engine.clip_grad_norm_(1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    engine.train(False)
    held_out = case.micro_batches - 1  # not a multiple of the processes
    validation = engine.measure(lambda i: case.batch(10_000 + i), held_out, case.objective).loss
    asked = [case.batch(20_000 + i) for i in mesh.local_shard(2 * mesh.dp_size)]
    logprobs = torch.cat(engine.evaluate(asked, logprobs_of_tokens), 1)
    with engine.using_adapter(None):
        reference = torch.cat(engine.evaluate(asked, logprobs_of_tokens), 1)
    return Result(losses, norms, validation, logprobs, reference, *grads, dict(engine.dense_tensors()))


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """The gradients of the trained parameters, whole on process 0."""
    sources = {name: source_of(p.grad) for name, p in engine.counted.items() if p.grad is not None}
    return {name: grad.clone() for name, grad in gathered(sources, engine.mesh, str)}


def logprobs_of_tokens(model: Llama, batch: Batch) -> torch.Tensor:
    """log p of each trained token [1, n]."""
    hidden = model.model(batch.tokens, batch.layout)
    return token_logprobs(hidden.flatten(0, 1), model.head.weight, batch.targets.flatten()).chosen[None]


def run_alone(case: Case) -> Result:
    """The case on this process alone."""
    return train(case.alone(), Mesh.alone("cpu"))


def main(cases: str, out: str) -> None:
    """One process of the group."""
    for case in (Case(**c) for c in json.loads(Path(cases).read_text())):
        began = time.perf_counter()
        with_mesh = init_mesh(ParallelConfig(**case.parallel, timeout=240), "cpu")
        result = train(case, with_mesh)
        if with_mesh.rank == 0:
            base = Path(out) / case.name()
            (base.parent / (base.name + ".json")).write_text(
                json.dumps(
                    {
                        "losses": result.losses,
                        "norms": result.norms,
                        "validation": result.validation,
                        "logprobs": result.logprobs.tolist(),
                        "reference": result.reference.tolist(),
                    }
                )
            )
            for part in PARTS:
                tensors = {k: v.contiguous().clone() for k, v in getattr(result, part).items()}
                save_file(tensors, base.parent / f"{base.name}.{part}")
            print(f"{time.perf_counter() - began:.1f} s {case}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_cases(cases: list[Case], world: int, out: Path, timeout: float = 280) -> dict[str, Result]:
    """Results by case name, of `world` processes. None of them outlives this call."""
    (out / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    run_processes([sys.executable, "-m", "helpers.parallel", str(out / "cases.json"), str(out)], world, timeout)
    results = {}
    for case in cases:
        base = out / case.name()
        numbers = json.loads((out / f"{base.name}.json").read_text())
        tensors = (load_file(out / f"{base.name}.{part}") for part in PARTS)
        numbers |= {name: torch.tensor(numbers[name]) for name in ("logprobs", "reference")}
        results[case.name()] = Result(**numbers, **dict(zip(PARTS, tensors, strict=True)))
    return results


@contextmanager
def started_by_torchrun(
    arguments: list[str], world: int, restarts: int, output: Path
) -> Iterator[subprocess.Popen[str]]:
    """A job of `world` processes, each `python ARGUMENTS`; nothing of it is left when the block ends."""
    options = [f"--nproc-per-node={world}", f"--max-restarts={restarts}", "--master-addr=127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--master-port={free_port()}", *arguments]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with open(output, "w") as file:
        job = subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    try:
        yield job
    finally:
        if job.poll() is None:
            for process in (*psutil.Process(job.pid).children(recursive=True), job):
                process.kill()
        job.wait()


def free_port() -> int:
    """One that nobody listens on, on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_processes(command: list[str], world: int, timeout: float) -> str:
    """Run `command` once for each rank as torchrun would; returns rank 0's output. Fails when any of them does."""
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in processes):
            if any(p.poll() for p in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        late = [rank for rank, p in enumerate(processes) if p.poll() is None]
        for rank in late:
            os.killpg(processes[rank].pid, signal.SIGKILL)
        outputs = [p.communicate()[0] for p in processes]
    failed = [f"rank {r} ended with {p.returncode}:\n{outputs[r]}" for r, p in enumerate(processes) if p.returncode]
    assert not failed, f"unfinished ranks: {late}\n" + "\n".join(failed)
    return outputs[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
