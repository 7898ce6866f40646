"""LoRA fine-tuning on the docstring pairs: Arriero against transformers + PEFT, alternating in one process.

    python bench/lora_training.py                    # throughput in turn, peak memory of each alone; a JSON line
    python bench/lora_training.py --final-loss 30    # also trains both for 30 steps on the same examples

Both train rank 16 on all linears of SmolLM2-135M with AdamW at the same rate, with loss on the answers only, and
EXAMPLES of them (on average, for packed rows) in an optimizer step. Throughput is that of one pass over the same POOL
of random examples, a step of each contender in turn. PEFT runs in fp32, and at its best here: pure bf16, batches of
examples of like length. Arriero runs as `arriero sft` does: bf16, packed rows, compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from arriero.checkpoint.hf import save_hf
from arriero.checkpoint.load import load, load_model
from arriero.data.docstrings import build_docstrings
from arriero.data.sft import SftDataset, build_dataset
from arriero.data.sft_loader import SftLoader
from arriero.distributed.parallelize import prepare
from arriero.model.lora import add_lora, lora_state
from arriero.model.lora_config import LoraConfig
from arriero.train.hardware import matmul_peak
from arriero.train.metrics import memory_bytes
from arriero.train.objectives import next_token

POOL, EXAMPLES, LR, RANK, SEQ_LEN = 128, 32, 2e-4, 16, 1024
PEER_BATCH = 8  # faster than 16 here
Step = Callable[[int], tuple[int, int, int]]  # step -> examples, their tokens, tokens computed (padding, sharing)


def arriero_step(dataset: SftDataset, compile: bool = True) -> tuple[Step, Callable[[], float]]:
    """One optimizer step over about EXAMPLES examples, and the loss on held-out rows."""
    torch.manual_seed(0)
    model = load_model("smollm2-135m", dtype=torch.bfloat16)
    add_lora(model, LoraConfig(rank=RANK))
    prepare(model.train(), compile=compile)
    training, held_out = split(dataset)
    loader, rest = SftLoader(training, SEQ_LEN, seed=0), SftLoader(held_out, SEQ_LEN, seed=0)
    rows_a_step = max(1, round(EXAMPLES * loader.rows_in_epoch(0) / len(training)))
    optimizer = torch.optim.AdamW(lora_state(model).values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(index: int) -> tuple[int, int, int]:
        rows = [loader.row(index * rows_a_step + i) for i in range(rows_a_step)]
        batches = [loader.collate([row], SEQ_LEN) for row in rows]
        trained = sum(batch.n_trained for batch in batches)
        for batch in batches:
            (next_token().sums(model, batch)["loss"] / trained).backward()
        optimizer.step()
        optimizer.zero_grad()
        examples = sum(len(row.lengths) for row in rows)
        useful = sum(len(row.tokens) for row in rows) + examples * len(loader.prefix)
        return examples, useful, len(rows) * SEQ_LEN

    @torch.no_grad()
    def evaluate() -> float:
        batches = [rest.collate([rest.row(i)], SEQ_LEN) for i in range(rest.rows_in_epoch(0))]
        return sum(next_token().sums(model, b)["loss"].item() for b in batches) / sum(b.n_trained for b in batches)

    return step, evaluate


def peft_step(dataset: SftDataset, directory: Path, dtype: torch.dtype) -> tuple[Step, Callable[[], float]]:
    """The same with transformers and PEFT: EXAMPLES examples in batches of PEER_BATCH of like length, padded."""
    import peft
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
    training, held_out = split(dataset)
    chunk = 16 * EXAMPLES  # sorted by length within so many shuffled examples, as its trainer's group_by_length does
    order = np.random.default_rng(0).permutation(len(training))
    batches = []
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(training.lengths[part], kind="stable")]
        groups = [part[i : i + PEER_BATCH] for i in range(0, len(part), PEER_BATCH)]
        batches += [groups[i] for i in np.random.default_rng(start).permutation(len(groups))]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def loss_sum(data: SftDataset, group: Any) -> tuple[torch.Tensor, int]:
        inputs = padded(data, group)
        n = int((inputs["labels"][:, 1:] != -100).sum())
        return model(**inputs).loss * n, n

    def step(index: int) -> tuple[int, int, int]:
        groups = [batches[(index * (EXAMPLES // PEER_BATCH) + i) % len(batches)] for i in range(EXAMPLES // PEER_BATCH)]
        trained = sum(int(training.trained(i)[1:].sum()) for group in groups for i in group)
        for group in groups:
            (loss_sum(training, group)[0] / trained).backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths = [training.lengths[group] for group in groups]
        return sum(map(len, groups)), int(sum(map(sum, lengths))), int(sum(len(x) * x.max() for x in lengths))

    @torch.no_grad()
    def evaluate() -> float:
        order = np.argsort(held_out.lengths)
        sums = [loss_sum(held_out, order[i : i + PEER_BATCH]) for i in range(0, len(order), PEER_BATCH)]
        return sum(loss.item() for loss, _ in sums) / sum(n for _, n in sums)

    return step, evaluate


def split(dataset: SftDataset) -> tuple[SftDataset, SftDataset]:
    """All but every forty-first example, and those."""
    index = np.arange(len(dataset))
    return dataset.select(index[index % 41 != 0]), dataset.select(index[index % 41 == 0])


def padded(dataset: SftDataset, group: Any) -> dict[str, torch.Tensor]:
    """Examples side by side, padded to the longest."""
    shape = len(group), int(dataset.lengths[group].max())
    ids, labels, mask = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
    for row, i in enumerate(group):
        n = int(dataset.lengths[i])
        ids[row, :n], mask[row, :n] = dataset.tokens(i), 1
        labels[row, :n] = np.where(dataset.trained(i), dataset.tokens(i), -100)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def make(name: str, dataset: SftDataset, directory: Path) -> tuple[Step, Callable[[], float]]:
    """The contender called `name`."""
    if name == "arriero":
        return arriero_step(dataset)
    return peft_step(dataset, directory, torch.float32 if name == "peft_fp32" else torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final-loss", type=int, default=0, help="steps of training to compare losses after")
    parser.add_argument("--work", type=Path, default=None, help="where data and the model's copy are kept")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    model_dir, quiet = work / "model", Console(quiet=True)
    if not (work / "train.jsonl").exists():
        build_docstrings("stdlib", work, console=quiet)
        save_hf(*load("smollm2-135m", dtype=torch.bfloat16)[:1], model_dir)
    tokenizer = load("smollm2-135m")[1]
    dataset = build_dataset(work / "train.jsonl", tokenizer, max_length=SEQ_LEN, console=quiet)
    if args.memory_of:
        step, _ = make(args.memory_of, dataset, model_dir)
        for index in range(3):
            step(index)
        print(memory_bytes())
        return
    result: dict[str, Any] = {"bench": "lora_training", "threads": torch.get_num_threads(), "examples_a_step": EXAMPLES}
    names = ["arriero", "peft_bf16", "peft_fp32"]
    for name in names:
        command = [sys.executable, __file__, "--work", str(work), "--memory-of", name]
        result[f"{name}_peak_gb"] = (
            int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e9
        )
    result["gemm_gflops"] = matmul_peak("cpu", torch.bfloat16) / 1e9
    result |= throughputs(names, dataset, model_dir)
    for name in names[1:]:
        result[f"times_{name}"] = result["arriero_examples_s"] / result[f"{name}_examples_s"]
    result["memory_of_peft_bf16"] = result["arriero_peak_gb"] / result["peft_bf16_peak_gb"]
    config = load_model("smollm2-135m").config
    blocks = config.n_params - config.vocab_size * config.dim
    # Forward and the gradient by inputs of a frozen base: 4 FLOPs a weight and token. Useful work counts every token of
    # every example, total work the prefix once a row, as computed.
    for kind in ("useful", "total"):
        work_done = 4 * blocks * result[f"arriero_{kind}_tokens_s"] / 1e9
        result[f"{kind}_share_of_gemm"] = work_done / result["gemm_gflops"]
    if args.final_loss:
        result |= final_losses(args.final_loss, dataset, model_dir)
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))


def throughputs(names: list[str], dataset: SftDataset, model_dir: Path) -> dict[str, Any]:
    """Examples a second over one pass of POOL random examples, and each step's useful tokens a second."""
    pool = dataset.select(np.random.default_rng(0).permutation(len(dataset))[:POOL])
    contenders = {name: make(name, pool, model_dir)[0] for name in names}
    done: dict[str, list[tuple[int, int, int, float]]] = {name: [] for name in names}
    for index in range(-1, POOL // EXAMPLES):
        for name, step in contenders.items():
            start = time.perf_counter()
            counts = step(max(index, 0))
            if index >= 0:  # the first step compiles and warms
                done[name].append((*counts, time.perf_counter() - start))
    out: dict[str, Any] = {}
    for name, steps in done.items():
        examples, useful, computed, seconds = (sum(column) for column in zip(*steps, strict=True))
        out[f"{name}_examples_s"] = examples / seconds
        out[f"{name}_useful_tokens_s"] = useful / seconds
        out[f"{name}_total_tokens_s"] = computed / seconds
        out[f"{name}_steps_useful_tokens_s"] = sorted(round(step[1] / step[3]) for step in steps)
    return out


def final_losses(steps: int, dataset: SftDataset, model_dir: Path) -> dict[str, Any]:
    """Held-out loss before and after `steps` optimizer steps of each from its start."""
    out: dict[str, Any] = {"loss_steps": steps}
    for name in ("arriero", "peft_bf16"):
        step, evaluate = make(name, dataset, model_dir)
        before = evaluate()
        for index in range(steps):
            step(index)
        out[f"{name}_loss"] = [round(before, 4), round(evaluate(), 4)]
    return out


if __name__ == "__main__":
    main()
