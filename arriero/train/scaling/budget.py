"""The plan for a compute budget: model size, tokens, steps, time and price.

The law is a fit of your own sweep or a published one; the hardware one of a few named devices, or this machine, which
is measured. Time is C / (devices x peak x MFU) with C = 6 N D, as accurate as the given MFU: Llama 3 405B had 38 to 43%
on H100s (arXiv 2407.21783, table 4).

C FLOPs, N parameters, D tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from arriero.errors import ConfigError, DataError, did_you_mean
from arriero.io.files import json_text
from arriero.io.paths import as_path, hint, lies_here
from arriero.io.reading import read_json
from arriero.model.catalogue import SHAPES
from arriero.train.scaling.laws import (
    PUBLISHED_LAWS,
    Law,
    LossLaw,
    PowerLaw,
    suggested_batch,
    suggested_lr,
)

THIS = "this"  # the machine that the command runs on
MFU = 0.4

PEAKS = {
    "a100": 312e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h200": 989e12,
    "b200": 2250e12,
    "l4": 121e12,
    "l40s": 362e12,
    "rtx3090": 71e12,
    "rtx4090": 165e12,
    "rtx5090": 209e12,
    "mi250x": 383e12,
    "mi300x": 1307e12,
}
"""Peak bf16 FLOP/s of one device with dense matrices and fp32 sums, from the makers' data sheets (whose larger numbers
are for 2:4 sparse ones; GeForce cards: the architecture white papers)."""


@dataclass(frozen=True)
class Known:
    """A law, by name or from a sweep, with what is known of its uncertainty and of the loss."""

    name: str
    law: Law
    loss: LossLaw | None
    resampled: Sequence[Law] = ()


@dataclass(frozen=True)
class BudgetPlan:
    """What to train, and what it takes. Seconds and cost are of all devices together, running side by side."""

    law: str
    flops: float
    params: float
    params_interval: tuple[float, float] | None
    tokens: float
    loss: float | None
    batch_tokens: int
    steps: int
    lr: float
    nearest_shape: str
    device: str
    devices: int
    peak: float  # FLOP/s of one device
    mfu: float
    seconds: float
    cost: float | None

    def json(self) -> str:
        """One JSON object."""
        return json_text({**dataclasses.asdict(self), "tokens_per_parameter": self.tokens / self.params}, indent=1)

    def table(self) -> Table:
        """As people read it."""
        table = Table(title=f"the best use of {self.flops:.3g} FLOPs, by {self.law}", show_header=False)
        table.add_row("parameters", _amount(self.params))
        if self.params_interval:
            table.add_row("  95% interval", " to ".join(map(_amount, self.params_interval)))
        table.add_row("  nearest known shape", f"{self.nearest_shape} ({_amount(SHAPES[self.nearest_shape].n_params)})")
        table.add_row("tokens", f"{_amount(self.tokens)} ({self.tokens / self.params:.1f} a parameter)")
        if self.loss is not None:
            table.add_row("  loss to expect", f"{self.loss:.3f} nats a token, on the law's data and tokenizer")
        table.add_row("steps", f"{self.steps:,} of {_amount(self.batch_tokens)} tokens")
        table.add_row("learning rate", f"{self.lr:.2g} (a place to begin)")
        table.add_row(
            "hardware", f"{self.devices:,} x {self.device}, {self.peak / 1e12:,.4g} TFLOP/s at {self.mfu:.0%}"
        )
        table.add_row("time", f"{_time(self.seconds)} ({_amount(self.devices * self.seconds / 3600)} device-hours)")
        table.add_row("cost", "give --price, per device-hour" if self.cost is None else f"{self.cost:,.2f}")
        return table


def make_plan(
    law: str,
    *,
    flops: float = 0.0,
    hours: float = 0.0,
    cost: float = 0.0,
    device: str = THIS,
    devices: int = 1,
    mfu: float = MFU,
    price: float = 0.0,
    batch_tokens: int = 0,
) -> BudgetPlan:
    """The plan for a budget given in one of FLOPs, hours (of all devices), or money.

    Raises `ConfigError` for anything but one budget, for unknown names and for impossible numbers.
    """
    _check(flops=flops, hours=hours, cost=cost, price=price, batch_tokens=batch_tokens)
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}; it is a share of the peak, in (0, 1]")
    if devices < 1:
        raise ConfigError(f"devices is {devices}; it must be at least 1")
    if sum(budget > 0 for budget in (flops, hours, cost)) != 1:
        raise ConfigError("give the budget as one of --flops, --hours or --cost")
    if cost and not price:
        raise ConfigError(f"cost {cost:g} is a budget only with a price; give --price, per device-hour")
    peak = peak_of(device)
    speed = devices * peak * mfu
    hours = hours or (cost / (price * devices) if cost else 0.0)
    flops = flops or hours * 3600 * speed
    known = open_law(law)
    params, tokens = known.law.params(flops), known.law.tokens(flops)
    batch = batch_tokens or round(suggested_batch(flops))
    seconds = flops / speed
    return BudgetPlan(
        law=known.name,
        flops=flops,
        params=params,
        params_interval=_interval(known, flops),
        tokens=tokens,
        loss=None if known.loss is None else known.loss.loss(params, tokens),
        batch_tokens=batch,
        steps=max(1, round(tokens / batch)),
        lr=suggested_lr(flops),
        nearest_shape=min(SHAPES, key=lambda name: abs(math.log(SHAPES[name].n_params / params))),
        device=device,
        devices=devices,
        peak=peak,
        mfu=mfu,
        seconds=seconds,
        cost=seconds / 3600 * devices * price if price else None,
    )


def peak_of(device: str) -> float:
    """Peak bf16 FLOP/s of a named device, or of this machine, measured."""
    if device == THIS:
        import torch

        from arriero.train.hardware import matmul_peak

        return matmul_peak("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    if device not in PEAKS:
        known = ", ".join((THIS, *PEAKS))
        raise ConfigError(f"device {device!r} is unknown{did_you_mean(device, PEAKS)} (known: {known})")
    return PEAKS[device]


def open_law(name: str) -> Known:
    """A published law by its name, or that of a sweep's directory or fit.json."""
    path = as_path(name)
    file = path / "fit.json" if path.is_dir() else path
    if name in PUBLISHED_LAWS and not (file.is_file() and lies_here(name, "the published law")):
        law = PUBLISHED_LAWS[name]
        return Known(name, law, law if isinstance(law, LossLaw) else None)
    if not file.is_file():
        remedy = did_you_mean(name, PUBLISHED_LAWS) or hint(path)
        if path.is_dir():
            remedy = f"; run: arriero scaling fit {name}"
        raise ConfigError(
            f"{name}: neither a published law ({', '.join(PUBLISHED_LAWS)}) nor a sweep with a fit.json{remedy}"
        )
    found = read_json(file, remedy="run `arriero scaling fit` again", refusal=DataError)
    try:
        refused = found.get("refused")
        power = None if refused else PowerLaw(**_values(found["power_law"]))
        loss = LossLaw(**_values(found["loss_law"])) if "loss_law" in found else None
        resampled = [PowerLaw(*map(_number, values)) for values in found["resamples"]["power_law"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        why = type(error).__name__  # is enough: the text may hold all of the file
        raise DataError(f"{file}: not what `arriero scaling fit` writes ({why}); run it again") from error
    if power is None:
        raise DataError(f"{file}: {refused}; or plan by a published law ({', '.join(PUBLISHED_LAWS)})")
    return Known(name, power, loss, resampled)


def _interval(known: Known, flops: float) -> tuple[float, float] | None:
    if not known.resampled:
        return None
    from arriero.train.scaling.fit import interval

    return interval([law.params(flops) for law in known.resampled])


def _values(law: dict[str, Any]) -> dict[str, float]:
    return {name: _number(entry["value"]) for name, entry in law.items()}


def _number(value: Any) -> float:
    """A number of a law: none is infinite, or below 0."""
    if not 0 <= (number := float(value)) < math.inf:
        raise ValueError(number)
    return number


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be above 0")


def _amount(number: float) -> str:
    """A large number with a unit: 16.3T, 383B, 1.24M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.3g}"


def _time(seconds: float) -> str:
    from arriero.train.metrics import duration

    return f"{seconds / 86400:,.1f} days" if seconds >= 2 * 86400 else duration(seconds)
