"""A pretraining step: Arriero against transformers, litgpt and torchtune's model, by turns in one process.

    python bench/pretraining.py                          # 30m, 8 rows of 512 tokens; a JSON line
    python bench/pretraining.py --model 124m --rows 4 --seq-len 1024 --micro-rows 2 --compiled

Each trains the same shape (random weights, tied embeddings) on the same full rows with AdamW and clipping, at its best
of eager and compiled, the whole batch at once and accumulated; --all adds fp32, which was far behind. Peers train in
pure bf16, Arriero as `arriero pretrain` does: fp32 weights, bf16 products, compiled blocks. Peers that are not
installed are left out by name (pip install --no-deps litgpt lightning; torchtune wants an old torchao).

Arriero's recipe has glibc keep freed memory (train/hardware.py), so it is kept in Arriero's steps and given back in the
peers', as glibc does by itself; --keep-for-all lets the peers profit too.

FLOPs are the model's own (`LlamaConfig.flops_per_token`), the peak that of a 2048^3 bf16 product here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.data.batch import Batch
from arriero.distributed.parallelize import prepare
from arriero.model.catalogue import LADDER
from arriero.model.config import LlamaConfig
from arriero.model.layout import Documents
from arriero.model.llama import Llama
from arriero.optim.build import build_optimizer
from arriero.train.hardware import keep_freed_memory, matmul_peak
from arriero.train.objectives import next_token

Step = Callable[[], float]
BF16 = torch.bfloat16
DTYPES = {"bf16": BF16, "fp32": torch.float32}


def arriero(shape: LlamaConfig, parts: Sequence[Tensor], dtype: torch.dtype, compiled: bool) -> Step:
    """As the recipe does it, the rows packed as documents of a batch."""
    model = Llama(shape).init_weights(seed=0, depth_scaled=True).set_compute_dtype(dtype).train()
    prepare(model, compile=compiled)
    batches = []
    for rows in parts:
        inputs, targets = rows[:, :-1].reshape(1, -1), rows[:, 1:].reshape(1, -1)
        batches.append(Batch(inputs, targets, Documents.of([rows.shape[1] - 1] * len(rows)), inputs.numel()))
    objective = next_token(compile=compiled)
    return stepper(model, [lambda b=b: objective.sums(model, b)["loss"] / b.n_trained for b in batches])  # type: ignore


def transformers(shape: LlamaConfig, parts: Sequence[Tensor], dtype: torch.dtype, compiled: bool) -> Step:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    config = Config(**shape.to_hf() | {"use_cache": False, "attn_implementation": "sdpa"})
    model: Any = LlamaForCausalLM(config).to(dtype).train()
    return peer(model, lambda forward, inputs: forward(input_ids=inputs).logits, parts, compiled)


def litgpt(shape: LlamaConfig, parts: Sequence[Tensor], dtype: torch.dtype, compiled: bool) -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        name="bench", block_size=shape.max_context, n_layer=shape.n_layers, n_embd=shape.dim, n_head=shape.n_heads,
        n_query_groups=shape.n_kv_heads, head_size=shape.head_dim, intermediate_size=shape.ffn_dim,
        vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", norm_eps=shape.norm_eps,
    )  # fmt: skip
    model: Any = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    model = model.to(dtype).train()
    model.max_seq_length = parts[0].shape[1] - 1
    return peer(model, lambda forward, inputs: forward(inputs), parts, compiled)


def torchtune(shape: LlamaConfig, parts: Sequence[Tensor], dtype: torch.dtype, compiled: bool) -> Step:
    from torchtune.models.llama3_2 import llama3_2

    model: Any = llama3_2(
        vocab_size=shape.vocab_size, num_layers=shape.n_layers, num_heads=shape.n_heads, num_kv_heads=shape.n_kv_heads,
        embed_dim=shape.dim, max_seq_len=shape.max_context, intermediate_dim=shape.ffn_dim, norm_eps=shape.norm_eps,
        rope_base=int(shape.rope_theta), scale_factor=1,
    )  # fmt: skip
    return peer(model.to(dtype).train(), lambda forward, inputs: forward(inputs), parts, compiled)


def peer(model: Any, logits: Callable[[Any, Tensor], Any], parts: Sequence[Tensor], compiled: bool) -> Step:
    """Train a peer's model with its logits as they come."""
    forward = torch.compile(model) if compiled else model

    def loss(rows: Tensor) -> Tensor:
        return mean_loss(logits(forward, rows[:, :-1].contiguous()), rows)

    return stepper(model, [lambda rows=rows: loss(rows) for rows in parts])  # type: ignore[misc]


def mean_loss(logits: Any, tokens: Tensor) -> Tensor:
    """Next-token cross-entropy in fp32, as each of the peers' recipes computes it."""
    if isinstance(logits, list):
        logits = torch.cat(logits, dim=1)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def stepper(model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> Step:
    """Forward and backward of equal parts of the batch, clipping and AdamW; returns the loss."""
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, "adamw", lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step() -> float:
        total = 0.0
        for part in losses:
            value = part() / len(losses)
            value.backward()
            total += value.item()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="30m", choices=LADDER)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-rows", type=int, default=4, help="rows at once, where a batch is accumulated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="leave the eager peers out")
    parser.add_argument("--all", action="store_true", help="every peer in fp32 too")
    parser.add_argument("--keep-for-all", action="store_true", help="keep freed memory in the peers' steps too")
    args = parser.parse_args()
    shape = LADDER[args.model]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (args.rows, args.seq_len + 1), generator=generator)
    result: dict[str, Any] = {"bench": "pretraining", "model": args.model, "rows": args.rows, "seq_len": args.seq_len}
    contenders: dict[str, Step] = {}
    splits = {"": args.rows, f" by {args.micro_rows}": args.micro_rows}
    for make in (arriero, transformers, litgpt, torchtune):
        for dtype in ("bf16", "fp32") if args.all else ("bf16",):
            for compiled in (True,) if make is arriero or args.compiled else (True, False):
                for split, rows in splits.items():
                    name = f"{make.__name__} {dtype} {'compiled' if compiled else 'eager'}{split}"
                    try:
                        contenders[name] = make(shape, tokens.split(rows), DTYPES[dtype], compiled)
                    except ImportError as error:
                        result.setdefault("left_out", {})[make.__name__] = " ".join(str(error).split())
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(-2, args.rounds):
        for name, step in contenders.items():
            keep_freed_memory(args.keep_for_all or name.startswith("arriero"))
            start = time.perf_counter()
            step()
            if index >= 0:  # the first steps compile and warm
                seconds[name].append(time.perf_counter() - start)
    n_tokens = args.rows * args.seq_len
    speeds = {name: n_tokens / median(times) for name, times in seconds.items()}
    ours = max((name for name in speeds if name.startswith("arriero")), key=speeds.__getitem__)
    theirs = max((name for name in speeds if not name.startswith("arriero")), key=speeds.__getitem__)
    peak = matmul_peak("cpu", BF16)
    share = shape.flops_per_token((args.seq_len + 1) / 2) / peak
    result |= {
        "tokens_s": {name: round(speed) for name, speed in speeds.items()},
        "ranges": {n: [round(n_tokens / x) for x in (max(seconds[n]), min(seconds[n]))] for n in (ours, theirs)},
        "best_peer": theirs,
        "times_best_peer": round(speeds[ours] / speeds[theirs], 2),
        "peak_gflops": round(peak / 1e9),
        "mfu": round(speeds[ours] * share, 3),
        "best_peer_mfu": round(speeds[theirs] * share, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
