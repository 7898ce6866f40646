"""Commands that fit scaling laws and plan by them."""

from __future__ import annotations

from pathlib import Path

from arriero.cli.train import finish
from arriero.io.paths import PathText
from arriero.show.terminal import output
from arriero.train.scaling.config import SweepConfig


def sweep(config: SweepConfig) -> None:
    """Train small models of several sizes for each budget of compute, to fit scaling laws to; resumable.

    Example:
        arriero scaling sweep --data out/shards --budgets 1e12 3e12 1e13 --out out/sweep
        arriero scaling sweep --data out/shards --budgets 1e17 3e17 1e18 1e19 --optimizer muon --seq-len 2048
    """
    from arriero.train.scaling.sweep import sweep as start

    finish(start(config))


def fit(sweep: Path, *, resamples: int = 1000, seed: int = 0, json: bool = False) -> None:
    """Fit laws to a sweep's losses, with bootstrap intervals and a picture: the best size and tokens for any compute.

    Example:
        arriero scaling fit out/sweep
        arriero scaling fit losses.jsonl --resamples 5000 --json

    Args:
        sweep: Directory of a sweep, or a file of JSON lines with params, tokens, loss and flops.
        resamples: Bootstrap draws for the intervals.
        seed: Decides the draws.
        json: Print JSON.
    """
    from arriero.train.scaling.run_fit import run_fit

    run_fit(sweep, resamples, seed, as_json=json)


def plan(
    law: PathText,
    *,
    flops: float = 0.0,
    hours: float = 0.0,
    cost: float = 0.0,
    device: str = "this",
    devices: int = 1,
    mfu: float = 0.4,
    price: float = 0.0,
    batch_tokens: int = 0,
    json: bool = False,
) -> None:
    """Say what to train with a budget: size, tokens, steps, time and cost on named hardware.

    Example:
        arriero scaling plan llama3 --flops 3.8e25 --device h100 --devices 16384
        arriero scaling plan out/sweep --hours 24 --device h100 --devices 8 --price 2.5
        arriero scaling plan chinchilla --hours 8 --json

    Args:
        law: Directory of a fitted sweep, or a published law: llama3, chinchilla, chinchilla-2022.
        flops: The budget in FLOPs;
        hours: or in hours of all devices;
        cost: or in money.
        device: this (measured), a100, h100, h100-pcie, h200, b200, l4, l40s, rtx3090, rtx4090, rtx5090, mi250x, mi300x.
        devices: How many of them.
        mfu: Share of their peak that training reaches.
        price: Of one device for an hour.
        batch_tokens: Tokens in a global batch; 0 takes 0.292 C^0.3271 (DeepSeek LLM).
        json: Print JSON.
    """
    from arriero.train.scaling.budget import make_plan

    found = make_plan(
        law,
        flops=flops,
        hours=hours,
        cost=cost,
        device=device,
        devices=devices,
        mfu=mfu,
        price=price,
        batch_tokens=batch_tokens,
    )
    if json:
        print(found.json())
    else:
        output().print(found.table())
