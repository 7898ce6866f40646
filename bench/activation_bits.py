"""What activations of eight bits lose in the engine, beside what the weights' rounding has lost already.

    python bench/activation_bits.py ORIGINAL QUANTISED [QUANTISED ...] --data TEXT [--chars 20000]

Each model reads TEXT by the engine's own step in C++ with activations of 15 and of 8 bits; its next-token distributions
are held against those of ORIGINAL, computed by torch in fp32. Prints one JSON line: for each model and number of bits
the mean KL divergence in nats a token with its standard error, and the perplexity's increase.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arriero.checkpoint.load import load_model, load_tokenizer_at, open_weights
from arriero.checkpoint.source import resolve
from arriero.eval.divergence import views_of
from arriero.eval.perplexity import Window
from arriero.infer.engine import open_step
from arriero.infer.step import BLOCK, Step, StepInput
from arriero.losses.lm import IGNORED

AT_ONCE = 512  # tokens of a step


def logits_of(step: Step, view: Window) -> Tensor:
    """Logits of the scored positions of a window, fp32 [n, V]."""
    ids, targets = np.array(view.inputs), np.array(view.targets)
    blocks, found = np.arange(-(-len(ids) // BLOCK))[None], []
    for at in range(0, len(ids), AT_ONCE):
        here = np.arange(at, min(at + AT_ONCE, len(ids)))
        wanted = np.flatnonzero(targets[here] != IGNORED)
        found.append(step(StepInput(ids[here], here, np.zeros(len(here), int), blocks, wanted, [None])))
    return torch.cat(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("quantised", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--chars", type=int, default=20_000)
    args = parser.parse_args()
    text = Path(args.data).read_text(encoding="utf-8")[: args.chars]
    tokenizer = load_tokenizer_at(resolve(args.original))
    views = views_of(open_weights(resolve(args.original)), tokenizer, [text])
    original = load_model(args.original, dtype=torch.float32)
    blocks = -(-max(len(view.inputs) for view in views) // BLOCK)
    models = [load_model(path, dtype=torch.bfloat16, packed=True).requires_grad_(False) for path in args.quantised]
    steps = {
        (path, bits): open_step(model, original.config.max_context, blocks, bits)  # type: ignore[arg-type]
        for path, model in zip(args.quantised, models, strict=True)
        for bits in (15, 8)
    }
    kls: dict[tuple[str, int], list[Tensor]] = {which: [] for which in steps}
    nats: dict[tuple[str, int], float] = dict.fromkeys(steps, 0.0)
    own = 0.0
    for view in views:
        targets = torch.tensor(view.targets)
        scored = targets != IGNORED
        p = original(torch.tensor([view.inputs]))[0][scored].log_softmax(-1)
        own -= float(p.gather(1, targets[scored, None]).sum())
        for which, step in steps.items():
            q = logits_of(step, view).log_softmax(-1)
            kls[which].append((p.exp() * (p - q)).sum(-1))
            nats[which] -= float(q.gather(1, targets[scored, None]).sum())
        print(f"{len(kls[which])} of {len(views)} windows", file=sys.stderr, flush=True)
    result: dict[str, object] = {"bench": "activation_bits", "chars": len(text)}
    for (path, bits), found in kls.items():
        kl = torch.cat(found)
        result[f"{Path(path).name}, {bits} bits"] = {
            "kl": float(kl.mean()),
            "kl_error": float(kl.std() / math.sqrt(len(kl))),
            "perplexity_increase": math.exp((nats[path, bits] - own) / len(kl)) - 1,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
