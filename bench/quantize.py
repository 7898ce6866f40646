"""What int8 and int4 cost, on weights that lie on no grid: SmolLM2-135M after a rotation of its residual stream.

    python bench/quantize.py                                  # a JSON line; about 20 minutes on two quiet cores
    python bench/quantize.py --only int4 --chars 20000        # sooner, and less sure
    python bench/quantize.py --only int4-nearest int4 --recover 0 1 2    # and what `--recover` gains, by seeds

The built-in weights came from a Q4_1 file: an affine 4-bit format copies them, and shows nothing. So the model judged
is another with the same outputs: RMSNorm's weights are folded into the matrices behind them, the head is untied, and
the residual stream is turned by a random orthogonal matrix (seed 0), which the matrices undo. Its fp32 logits equal the
original's within 1e-3 (checked), and no group of 32 weights lies on a grid of 16 steps any more (printed: the
distance of the original and the rotated weights from the nearest grid of Q4_1, relative to their size).

Formats: the gguf package's Q4_0 (llama.cpp's rounding) for all matrices, head included; nearest and calibrated int8 and
int4. int4 and Q4_0 read the same bytes for a token. Text: the first 60,000 characters of WikiText-2's test part where
../shared/data has it, else of Python's reference manual; calibration: WikiText-2's validation part, else the default.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from arriero.checkpoint.hf import LINEAR_ENDS, save_hf
from arriero.checkpoint.load import load_model, load_tokenizer_at, open_weights
from arriero.checkpoint.quantize import quantize
from arriero.checkpoint.source import resolve
from arriero.checkpoint.weights import Weights
from arriero.eval.divergence import divergence, final_states, views_of
from arriero.model.build import build_model
from arriero.model.llama import EMBEDDINGS, HEAD, Llama
from arriero.train.recover import recover

SHARED = Path(__file__).parents[2] / "shared" / "data"
Q4_0, Q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1


@torch.no_grad()
def rotated(model: Llama, seed: int = 0) -> Llama:
    """The same function of tokens by other weights: norms folded, head untied, the residual stream turned."""
    config = replace(model.config, tied_embeddings=False)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    state[HEAD] = state[HEAD if HEAD in state else EMBEDDINGS].clone()
    random = torch.randn(config.dim, config.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn, upper = torch.linalg.qr(random)
    turn = turn * upper.diagonal().sign()

    def fold(norm: str, matrices: list[str]) -> None:
        for name in matrices:
            state[name] = (state[name] * state[norm]) @ turn
        state[norm] = torch.ones_like(state[norm])

    for layer in (f"model.layers.{i}." for i in range(config.n_layers)):
        fold(f"{layer}input_layernorm.weight", [f"{layer}self_attn.{x}_proj.weight" for x in "qkv"])
        fold(f"{layer}post_attention_layernorm.weight", [f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up")])
        for name in (f"{layer}self_attn.o_proj.weight", f"{layer}mlp.down_proj.weight"):
            state[name] = turn.T @ state[name]
    fold("model.norm.weight", [HEAD])
    state[EMBEDDINGS] = state[EMBEDDINGS] @ turn
    other = build_model(config)
    other.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return other.eval()


def packed_by_gguf(weight: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """A matrix as the gguf package rounds it."""
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.float().numpy(), kind), kind))


def distance_from_grid(weights: Weights) -> float:
    """||Q4_1(W) - W|| / ||W|| over some layers' matrices."""
    names = [name for name in weights.entries if name.endswith(LINEAR_ENDS) and ".layers.1" in name]
    off = size = 0.0
    for name in names:
        weight = weights.read(name).float()
        off += float((packed_by_gguf(weight, Q4_1) - weight).square().sum())
        size += float(weight.square().sum())
    return (off / size) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--chars", type=int, default=60_000)
    parser.add_argument("--only", nargs="*", default=["q4_0", "int8", "int8-nearest", "int4", "int4-nearest"])
    parser.add_argument("--recover", nargs="*", type=int, default=[], metavar="SEED")
    parser.add_argument("--calibrate", default=str(SHARED / "wikitext2-valid.txt"))
    args = parser.parse_args()
    calibrate = args.calibrate if Path(args.calibrate).is_file() else "default"
    test = SHARED / "wikitext2-test.txt"
    if test.is_file():
        text = test.read_text(encoding="utf-8")[: args.chars]
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())[: args.chars]
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measured(args.model, text, calibrate, args.only, args.recover, Path(scratch))))


def measured(
    model: str, text: str, calibrate: str, formats: list[str], seeds: list[int], scratch: Path
) -> dict[str, Any]:
    """Everything that is printed."""
    source = scratch / "rotated"
    original, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer_at(resolve(model))
    turned = rotated(original)
    ids = torch.tensor([tokenizer.encode(text)[:200]])
    with torch.no_grad():
        off = float((original(ids) - turned(ids)).abs().max())
    assert off < 1e-3, f"rotation changed the logits by {off}"
    save_hf(turned, source, tokenizer)
    weights = open_weights(source)
    plain = Weights(source, original.config, weights.entries, lambda name: original.state_dict()[name])
    result: dict[str, Any] = {
        "bench": "quantize",
        "model": model,
        "chars": len(text),
        "calibration": Path(calibrate).name,
        "logits_off_by_rotation": off,
        "grid_distance_before": distance_from_grid(plain),
        "grid_distance_after": distance_from_grid(weights),
    }
    known = final_states(weights, views_of(weights, tokenizer, [text]))

    def judge(name: str, other: Weights, size: int | None, seconds: float) -> None:
        found = divergence(weights, other, tokenizer, [text], known=known)
        before, after = found.perplexity
        result["perplexity"] = before
        result[name] = {
            "perplexity": after, "increase": after / before - 1, "kl": found.kl, "kl_error": found.kl_error,
            "same_top": found.same_top, "bytes_per_token": size, "seconds": seconds,
        }  # fmt: skip
        print(name, json.dumps(result[name]), file=sys.stderr, flush=True)

    for name in formats:
        began = time.perf_counter()
        if name == "q4_0":

            def read(name: str) -> Tensor:
                weight = weights.read(name)
                return packed_by_gguf(weight, Q4_0) if name.endswith(LINEAR_ENDS) else weight

            other, size = replace(weights, read=read), None
        else:
            kind, _, nearest = name.partition("-")
            done = quantize(source, scratch / name, type=kind, calibrate=None if nearest else calibrate)  # type: ignore[arg-type]
            other, size = open_weights(scratch / name), done.per_token[1]
        seconds = time.perf_counter() - began
        judge(name, other, size, seconds)
        for seed in seeds if size is not None else []:
            copy, began = scratch / f"{name}-{seed}", time.perf_counter()
            shutil.copytree(scratch / name, copy)
            recover(source, copy, calibrate, seed=seed)
            judge(f"{name}, recovered, seed {seed}", open_weights(copy), size, time.perf_counter() - began)
    return result


if __name__ == "__main__":
    main()
