"""Time to a validation loss: Arriero's pretraining against a plain one, the same Llama on the same text.

    python bench/time_to_loss.py --work DIR                  # three seeds of both, about 20 minutes; a JSON line
    python bench/time_to_loss.py --work DIR --run plain 1    # one run of them; what is done is kept in DIR

The model is the ladder's 10m with the vocabulary of runs/from-scratch.sh (8.9 M parameters), the text that script's:
the standard library's source and topics, and ../shared/data/prose.jsonl.gz where present, by Arriero's own commands.

  plain    transformers' LlamaForCausalLM as it comes: eager, SDPA, bf16 autocast (fp32 takes 2.4 times as long, pure
           bf16 no less), fused AdamW, cosine; documents end to end without masks, in rows of 512 that are shuffled
  arriero  `arriero pretrain` with RECIPE: Muon, best-fit packing with document masks, compiled
  eager    plain's batches and optimizer under Arriero's own model, eager; not among the three seeds' runs

A seed's runs begin from the same weights. Each has its own number of steps and a schedule that is finished at their
end; where plain ends is the target, and Arriero has to end at or under it. Seconds are those of training steps (making
batches, forward, backward, optimizer), without validation. What the first step takes longer than the median one is the
compiler's work, from an empty cache, and given apart. Bits per byte are measured by one function for all, on the same
beginning of the held-out documents: in pieces of at most 512 tokens that see only themselves (`bpb`), and end to end in
rows of 512, as plain is trained (`bpb_concat`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from arriero.data.pretrain_loader import DataStage, PretrainLoader
from arriero.data.sft_loader import IGNORED
from arriero.data.shards import Shards, open_sources
from arriero.model.llama import Llama
from arriero.optim.build import decay_groups
from arriero.optim.schedule import lr_factor
from arriero.tokenizer import load_tokenizer
from arriero.train.config import LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig
from arriero.train.objectives import next_token
from arriero.train.pretrain import build

MODEL, SEQ_LEN, VOCABULARY, HELD_OUT_ROWS = "10m", 512, 4096, 256
# Plain's rate and rows are the best of those tried (docs/log.md); its steps take four minutes here.
PLAIN_ROWS, PLAIN_STEPS = 2, 1000
PLAIN = OptimConfig("adamw", lr=1e-3, schedule="cosine", warmup=0.05, min_lr=0.1, weight_decay=0.1)
ROWS, STEPS = 8, 120
RECIPE = OptimConfig("muon", lr=4e-3, schedule="wsd", warmup=0.05, min_lr=0.0, weight_decay=0.1)
Arm = Literal["plain", "arriero", "eager"]
Step = Callable[[int], Any]


def arriero(shards: Path, seed: int, steps: int) -> tuple[Llama, Step]:
    """The recipe behind `arriero pretrain`: its model and its step."""
    config = PretrainConfig(
        model=MODEL,
        out=tempfile.gettempdir(),  # nothing is written
        data=PretrainDataConfig(train=str(shards), seq_len=SEQ_LEN),
        optim=RECIPE,
        loop=LoopConfig(steps=steps, batch_rows=ROWS, micro_rows=ROWS, compile="on", seed=seed),
    )
    run = build(config, Console(quiet=True))
    return run.model, lambda _: run.trainer.step()


def plain(shards: Path, seed: int, steps: int, eager: bool = False) -> tuple[nn.Module, Step]:
    """A plain loop around transformers' model, or Arriero's (`eager`), from the weights that `arriero` begins with."""
    ours, _ = arriero(shards, seed, steps)
    model: Any = Llama(ours.config).set_compute_dtype(torch.bfloat16) if eager else transformers(ours)
    model.load_state_dict(ours.state_dict())
    groups = decay_groups(dict(model.named_parameters()), PLAIN.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=PLAIN.lr, betas=PLAIN.betas, eps=PLAIN.eps, fused=True)
    sources = open_sources(shards / "train")
    loader = PretrainLoader(sources, [DataStage(0, SEQ_LEN, dict.fromkeys(sources, 1.0))], seed, "concat")

    def step(index: int) -> None:
        rows = [loader.row(i) for i in range(index * PLAIN_ROWS, (index + 1) * PLAIN_ROWS)]
        inputs = torch.stack([torch.from_numpy(row.tokens) for row in rows]).long()
        targets = torch.cat([torch.from_numpy(row.targets) for row in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=not eager):
            logits = model(inputs) if eager else model(input_ids=inputs).logits
        F.cross_entropy(logits.float().flatten(0, 1), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), PLAIN.clip)
        for group in optimizer.param_groups:
            group["lr"] = PLAIN.lr * lr_factor(index, steps, PLAIN.schedule, PLAIN.warmup, PLAIN.min_lr)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def transformers(like: Llama) -> nn.Module:
    """The same shape as transformers has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**like.config.to_hf() | {"use_cache": False, "attn_implementation": "sdpa"})
    return LlamaForCausalLM(config).float().train()


def train(arm: Arm, shards: Path, seed: int, steps: int) -> dict[str, Any]:
    """Train one of the three and measure it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    make = arriero if arm == "arriero" else plain
    model, step = plain(shards, seed, steps, eager=True) if arm == "eager" else make(shards, seed, steps)
    seconds = []
    for index in range(steps):
        start = time.perf_counter()
        step(index)
        seconds.append(time.perf_counter() - start)
    measured = arriero(shards, seed, steps)[0] if arm == "plain" else model
    measured.load_state_dict(model.state_dict())
    compiling = seconds[0] - median(seconds)
    return {
        "seconds": sum(seconds) - compiling,
        "compiling": compiling,
        "step": [min(seconds), median(seconds), max(seconds[1:])],
        "bpb": bits_per_byte(measured, open_sources(shards / "validation"), "best-fit"),
        "bpb_concat": bits_per_byte(measured, open_sources(shards / "validation"), "concat"),
    }


@torch.no_grad()
def bits_per_byte(model: Any, held_out: Mapping[str, Shards], packing: Literal["best-fit", "concat"]) -> float:
    """Over the first rows of the held-out documents, and the bytes of the tokens that these predict."""
    ((name, shards),) = held_out.items()
    loader = PretrainLoader(held_out, [DataStage(0, SEQ_LEN, {name: 1.0})], 0, packing)
    rows = [loader.row(i) for i in range(min(HELD_OUT_ROWS, loader.rows_in_epoch(name)))]
    tokenizer = load_tokenizer(shards.tokenizer_directory)
    nats, n_bytes = 0.0, 0.0
    with torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call]
        for start in range(0, len(rows), ROWS):
            batch = loader.collate(rows[start : start + ROWS])
            nats += next_token().sums(model, batch)["loss"].item()
            n_bytes += tokenizer.text_bytes(batch.targets[batch.targets != IGNORED].numpy()).sum()
    return nats / math.log(2) / n_bytes


def make_shards(work: Path) -> Path:
    """What runs/from-scratch.sh makes, by the same commands; once."""
    prose = Path(__file__).resolve().parents[2] / "shared/data/prose.jsonl.gz"
    sources = ["stdlib", *([str(prose)] if prose.exists() else [])]
    corpus, tokenizer, shards = work / "corpus", work / "tokenizer", work / "shards"
    learn = ["tokenizer", "train", corpus, "--kind", "llama3", "--vocab-size", VOCABULARY, "--n-special", 16]
    cut = ["shard", corpus, "--tokenizer", tokenizer, "--validation", 0.05]
    for file, command, out in (
        ("manifest.json", ["curate", *sources], corpus),
        ("tokenizer.json", learn, tokenizer),
        ("train/manifest.json", cut, shards),
    ):
        if not (out / file).exists():
            words = [sys.executable, "-m", "arriero", *map(str, command), "--out", str(out)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return shards


def run(arm: Arm, seed: int, work: Path) -> dict[str, Any]:
    """One run, in a process of its own; read where it has been done with these settings."""
    settings = {"steps": STEPS, "rows": ROWS} | dataclasses.asdict(RECIPE)
    if arm != "arriero":
        settings = {"steps": PLAIN_STEPS, "rows": PLAIN_ROWS} | dataclasses.asdict(PLAIN)
    settings = json.loads(json.dumps(settings))
    file = work / f"{arm}-{seed}.json"
    if file.exists() and (done := json.loads(file.read_text()))["settings"] == settings:
        return done
    shards = make_shards(work)
    print(f"{arm}, seed {seed}: {settings['steps']} steps", file=sys.stderr)
    done = {"arm": arm, "seed": seed, "settings": settings} | train(arm, shards, seed, settings["steps"])
    file.write_text(json.dumps(done))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the data and finished runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", nargs=2, default=None, metavar=("ARM", "SEED"), help="one run and nothing else")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.run:
        print(json.dumps(run(args.run[0], int(args.run[1]), args.work)))
        return
    done: dict[Arm, list[dict[str, Any]]] = {"plain": [], "arriero": []}
    for seed in range(args.seeds):
        for arm, runs in done.items():
            alone = [sys.executable, __file__, "--work", str(args.work), "--run", arm, str(seed)]
            output = subprocess.run(alone, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
    pairs = list(zip(done["plain"], done["arriero"], strict=True))
    ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
    whole = [
        sum(theirs[k] for k in ("seconds", "compiling")) / sum(ours[k] for k in ("seconds", "compiling"))
        for theirs, ours in pairs
    ]
    result: dict[str, Any] = {"bench": "time_to_loss", "model": MODEL, "threads": torch.get_num_threads()}
    for arm, runs in done.items():
        result |= {f"{arm}_steps": runs[0]["settings"]["steps"], f"{arm}_rows": runs[0]["settings"]["rows"]}
        for key, digits in (("seconds", 1), ("compiling", 1), ("bpb", 4), ("bpb_concat", 4)):
            result[f"{arm}_{key}"] = [round(one[key], digits) for one in runs]
    result |= {
        "reached": [
            ours["bpb"] <= theirs["bpb"] and ours["bpb_concat"] <= theirs["bpb_concat"] for theirs, ours in pairs
        ],
        "times_faster": [round(ratio, 2) for ratio in ratios],
        "times_faster_compiling_included": [round(ratio, 2) for ratio in whole],
        "mean_times_faster": round(mean(ratios), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
