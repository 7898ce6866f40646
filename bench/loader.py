"""What a pretraining step waits for its data: rows made when they are asked for, and made in the background.

    python bench/loader.py [--documents 300000] [--steps 100] [--threads 2]

Writes shards with lengths as the web has them (log-normal, median 500 tokens, mean about 1,000; random ids), drops them
from the page cache, and trains a small model (6M parameters, 8 rows of 512 tokens, bf16: a short step) by each
way in turn, ten steps at a time. Prints one JSON line: for each way the median step and wait in milliseconds, the
worst wait, and the share of the time that was waited (the bound is 1%); for the loader alone the CPU seconds to open,
to pack a window, and per million tokens; and the padding at 512 and 4,096 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from arriero.checkpoint.source import resolve
from arriero.data.batch import Batch
from arriero.data.prefetch import Prefetched
from arriero.data.pretrain_loader import DataStage, PretrainLoader
from arriero.data.shard_writer import MarkedDocuments, ShardWriter
from arriero.data.shards import Shards
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.tokenizer import load_tokenizer
from arriero.train.objectives import next_token

ROWS, SEQ_LEN, VOCAB = 8, 512, 4096
SHAPE = LlamaConfig(dim=256, n_layers=4, n_heads=4, n_kv_heads=4, ffn_dim=688, vocab_size=VOCAB, max_context=SEQ_LEN)


def write(out: Path, n: int) -> Shards:
    """n documents of random ids, in files that are not in the page cache."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(500), 1.2, n), 2, 400_000).astype(np.int64)
    request = {"tokenizer": "none", "bos": None, "eos": None}
    with ShardWriter(out, load_tokenizer(resolve("smollm2-135m")), request, by_source=False) as writer:
        for part in np.array_split(lengths, 8):
            tokens = rng.integers(0, VOCAB, part.sum(), dtype=np.uint16)
            writer.add({("train", "documents"): MarkedDocuments(tokens, part, part * 4)}, {}, (0, 0))
            writer.commit()
        writer.finish()
    for path in (out / "train").iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Shards(out / "train")


def loader_alone(shards: Shards) -> dict[str, float]:
    """CPU seconds of the loader's parts, and padding."""
    figures: dict[str, float] = {}
    for seq_len in (SEQ_LEN, 4096):
        began = time.process_time()
        loader = PretrainLoader({"documents": shards}, [DataStage(0, seq_len, {"documents": 1.0})], seed=0)
        opened = time.process_time()
        loader.row(0)
        packed = time.process_time()
        tokens = sum(len(loader.row(i).tokens) for i in range(4_000_000 // seq_len))
        done = time.process_time()
        padding = 1 - shards.n_predicted / (loader.rows_in_epoch("documents") * seq_len)
        figures |= {
            f"open s, {seq_len}": round(opened - began, 3),
            f"pack a window s, {seq_len}": round(packed - opened, 3),
            f"s per million tokens, {seq_len}": round((done - packed) / tokens * 1e6, 4),
            f"padding, {seq_len}": round(padding, 6),
        }
    return figures


def train(make: dict[str, Callable[[int], Batch]], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of steps and waits by each way of making batches."""
    torch.manual_seed(0)
    model = Llama(SHAPE).init_weights(seed=0)
    model.set_compute_dtype(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in make}
    for block in range(-1, steps // 10):  # the first block warms up
        for name, batches in make.items():
            for step in range((block + 1) * 10, (block + 2) * 10):
                began = time.perf_counter()
                batch = batches(step)
                waited = time.perf_counter() - began
                (next_token().sums(model, batch)["loss"] / batch.n_trained).backward()
                optimizer.step()
                optimizer.zero_grad()
                if block >= 0 and step % 10:  # a block's first step finds nothing made ahead in either way
                    times[name].append((time.perf_counter() - began, waited))
    return {
        name: {
            "step ms": round(1e3 * statistics.median(s for s, _ in found), 2),
            "wait ms": round(1e3 * statistics.median(w for _, w in found), 3),
            "worst wait ms": round(1e3 * max(w for _, w in found), 2),
            "waited": round(sum(w for _, w in found) / sum(s for s, _ in found), 5),
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        shards = write(Path(work) / "shards", args.documents)

        def batches() -> Callable[[int], Batch]:
            loader = PretrainLoader({"documents": shards}, [DataStage(0, SEQ_LEN, {"documents": 1.0})], seed=0)
            rows = lambda step: range(step * ROWS, (step + 1) * ROWS)  # noqa: E731
            return lambda step: loader.collate([loader.row(i) for i in rows(step)])

        last = 10 * (args.steps // 10 + 1)
        prefetched = {f"background, {n}": Prefetched(batches(), last, workers=n) for n in (1, 2)}
        report = {
            "bench": "loader",
            "threads": args.threads,
            "documents": shards.n_documents,
            "tokens": shards.n_tokens,
            **train({"when asked": batches(), **prefetched}, args.steps),
            **loader_alone(shards),
        }
        for each in prefetched.values():
            each.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
