"""Fits scaling laws to the losses of a sweep, by the two published methods, each with bootstrap intervals.

isoFLOP: for each budget a parabola of loss over log N has its minimum at the best size; the tokens that go with these
sizes follow D = A C^alpha, a line in log-log (Chinchilla, arXiv 2203.15556, approach 2; Llama 3, 2407.21783, 3.2.1).
Parametric: L(N, D) = E + A/N^alpha + B/D^beta by Huber loss on log L, from a grid of initial values (Chinchilla,
approach 3). The optimizer has to converge: stopped early it gave Chinchilla's odd constants (arXiv 2404.10102).

Runs belong to one budget where their sorted FLOPs are each within NEAR of the next: tokens are rounded to batches, so
6 N D of runs of one budget differs slightly.

A sweep costs hours, so every law that its runs determine is given: a budget whose losses have no minimum is left out of
the isoFLOP law only; with fewer than two minima there is the parametric law only.

Intervals: residuals of the fitted curves are resampled with replacement and added to the curves, everything is fitted
again, and the middle 95% is kept. Resampling whole runs instead would lose the sizes around a minimum, of which a
small sweep has two or three. Price: about 5 ms a resample for two dozen runs.

C FLOPs, N parameters, D tokens, n runs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arriero.errors import DataError, require
from arriero.show.progress import each
from arriero.train.scaling.laws import FLOPS_PER_PARAMETER, NEAR, LossLaw, PowerLaw

ROUNDING = 1e-6  # relative difference of FLOPs within a budget that needs no notice
SPREAD = 1.25  # times by which the FLOPs of a budget may differ in all: budgets lie further apart, and laws need that
LEVEL = 95  # per cent of the resamples that an interval holds
HUBER = 1e-3  # residual of log L from which it counts by its size, not its square (Chinchilla)
BEGINNINGS = 8  # of the grid's points, those of lowest objective that the search is begun from
NEAR_RULE = f"runs are of one budget where the FLOPs of each lie within {NEAR:.0%} of the next one's"
REMEDY = "run more --sizes, over a larger --spread, around other --tokens-per-param, or with more --seeds"
BOUNDS = ((-20, 20), (-50, 100), (-1, 6), (-50, 100), (-1, 6))  # of e, a, alpha, b, beta; published laws lie far inside

Array = NDArray[np.float64]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runs:
    """Measured runs: arrays of one length, and the budget that each was meant for."""

    flops: Array
    params: Array
    tokens: Array
    loss: Array

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: NDArray[np.int64]) -> Runs:
        """Some of them, in this order."""
        return Runs(self.flops[rows], self.params[rows], self.tokens[rows], self.loss[rows])

    @property
    def budgets(self) -> Array:
        """The budgets, in ascending order."""
        return np.unique(self.flops)


@dataclass(frozen=True)
class Minimum:
    """The bottom of a budget's parabola, loss = loss_at + curvature (ln N - ln params)^2; NaN where there is none."""

    flops: float
    params: float = math.nan
    loss: float = math.nan
    curvature: float = math.nan
    inside: bool = False  # between the smallest and the largest model of the budget

    @property
    def found(self) -> bool:
        """Whether the losses have a minimum, so that the budget counts for the isoFLOP law."""
        return not math.isnan(self.params)


@dataclass(frozen=True)
class Fit:
    """Both laws, the minima that the first rests on, and what resampling made of them.

    A law that the runs do not determine is NaN, and has no resamples.
    """

    runs: Runs
    minima: list[Minimum]  # one for each budget
    power: PowerLaw
    loss: LossLaw
    powers: list[PowerLaw]  # resampled
    losses: list[LossLaw]  # resampled
    discarded: int  # resamples in which some budget that counts had no minimum
    refused: str = ""  # why there is no isoFLOP law

    def summary(self) -> dict[str, Any]:
        """As JSON, resamples included: what `arriero scaling plan` reads. A law that is not there is absent."""
        laws: dict[str, tuple[Any, Sequence[Any]]] = {
            "power_law": (self.power, self.powers),
            "loss_law": (self.loss, self.losses),
        }
        return {
            "runs": len(self.runs),
            "minima": [dataclasses.asdict(minimum) for minimum in self.minima if minimum.found],
            "left_out": [minimum.flops for minimum in self.minima if not minimum.found],
            **({"refused": self.refused} if self.refused else {}),
            **({"at_bounds": self.at_bounds} if self.at_bounds else {}),
            **{name: _with_intervals(law, resampled) for name, (law, resampled) in laws.items() if resampled},
            "resamples": {
                "power_law": [list(dataclasses.astuple(law)) for law in self.powers],
                "loss_law": [list(dataclasses.astuple(law)) for law in self.losses],
                "discarded": self.discarded,
            },
        }

    @property
    def at_bounds(self) -> list[str]:
        """The constants of the parametric law that the runs leave open."""
        return at_bounds(self.loss) if self.losses else []

    def view(self) -> RenderableType:
        """As people read it."""
        return Group(self._minima_table(), self._laws_table())

    def _minima_table(self) -> Table:
        table = Table(title="the best model of each budget")
        headings = (
            "FLOPs",
            "runs",
            "parameters",
            "loss",
            "parameters by the law",
            f"{LEVEL}% interval",
            "tokens",
            "D/N",
        )
        for heading in headings:
            table.add_column(heading, justify="right")
        captions = {}
        for m in self.minima:
            own = self.runs.take(np.flatnonzero(self.runs.flops == m.flops))
            best_params, best_loss, mark = m.params, m.loss, ""
            if not m.found:
                best = own.loss.argmin()
                best_params, best_loss, mark = own.params[best], own.loss[best], " +"
                captions[mark] = "+ no minimum: the run of lowest loss, left out of the isoFLOP law"
            elif not m.inside:
                mark = " *"
                captions[mark] = (
                    "* beyond the models that were run: extrapolated; give the sweep other --tokens-per-param"
                )
            low, high = interval([law.params(m.flops) for law in self.powers])
            params, tokens = self.power.params(m.flops), self.power.tokens(m.flops)
            by_law = (f"{params:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{tokens:,.0f}", f"{tokens / params:.1f}")
            table.add_row(
                f"{m.flops:.3g}",
                str(len(own)),
                f"{best_params:,.0f}{mark}",
                f"{best_loss:.4f}",
                *(by_law if self.powers else ["none"] * 4),
            )
        table.caption = "\n".join(captions.values()) or None
        return table

    def _laws_table(self) -> Table:
        table = Table(
            title=f"laws, with {LEVEL}% intervals of {len(self.powers or self.losses)} resamples", show_header=False
        )
        laws: dict[str, tuple[Any, Sequence[Any]]] = {
            "isoFLOP: D = coefficient C^exponent": (self.power, self.powers),
            "parametric: L = floor + a / N^alpha + b / D^beta": (self.loss, self.losses),
        }
        for title, (law, resampled) in laws.items():
            table.add_row(Text(title, "bold"), "" if resampled else "none", "")
            if not resampled:
                continue
            open_ends = self.at_bounds if isinstance(law, LossLaw) else []
            for name, value in dataclasses.asdict(law).items():
                mark = " !" if name in open_ends else ""
                _add(table, name + mark, value, [getattr(other, name) for other in resampled])
            _add(table, "N grows as C to the", _growth(law), [_growth(other) for other in resampled])
        captions = ["! at the bound of its search: the runs do not determine it"] * bool(self.at_bounds)
        if self.discarded:
            captions.append(f"{self.discarded} resamples were left out: a budget's losses had no minimum")
        table.caption = "\n".join(captions) or None
        return table


def budgets_of(flops: Array) -> Array:
    """The budget of each run: the median FLOPs of those within NEAR of each other.

    Raises `DataError` where budgets cannot be distinguished, since a group spreads over more than SPREAD.
    """
    budgets = np.empty_like(flops)
    order = np.argsort(flops, kind="stable")
    ends = np.flatnonzero(flops[order][1:] > (1 + NEAR) * flops[order][:-1]) + 1
    for part in np.split(order, ends):
        low, high = flops[part[0]], flops[part[-1]]
        if high > SPREAD * low:
            raise DataError(
                f"the FLOPs of {len(part)} runs go from {low:.3g} to {high:.3g} without a gap that tells budgets apart "
                f'({NEAR_RULE}); give the FLOPs that each was meant for as its "flops", the same for all of a budget'
            )
        budgets[part] = low if low == high else float(f"{np.median(flops[part]):.6g}")
    return budgets


def fit(runs: Runs, resamples: int = 1000, seed: int = 0) -> Fit:
    """Fit both laws, and again to `resamples` draws.

    Budgets whose losses have no minimum are left out of the isoFLOP law, with a warning; where fewer than two are left,
    or most resamples lose one, there is no such law, and `refused` has the reason. Raises `DataError` for too few
    budgets or sizes.
    """
    _check(runs)
    minima = [_minimum(runs, flops) for flops in runs.budgets]
    for minimum in minima:
        if not minimum.found:
            _warn(runs, minimum.flops)
    loss = fit_loss(runs)
    if not min(loss.alpha, loss.beta) > 0:  # then no size is the best
        loss = LossLaw(*[math.nan] * 5)
    elif open_ends := at_bounds(loss):
        log.warning(
            "the parametric law's %s %s: the runs do not determine it, and what it foretells outside of them means "
            "little; run models and tokens over a wider range",
            " and ".join(open_ends),
            "ends at the bound of its search" if len(open_ends) == 1 else "end at the bounds of their search",
        )
    kept = [minimum for minimum in minima if minimum.found]
    discarded = 0
    if len(kept) < 2:
        refused = (
            f"no isoFLOP law: the losses of {len(kept)} of {len(minima)} budgets have a minimum near the models' "
            f"sizes, and a law needs at least 2; {REMEDY}"
        )
    else:
        powers, losses, discarded = _resampled(runs, kept, loss, resamples, seed)
        if len(powers) >= max(1, resamples // 2):
            return Fit(runs, minima, fit_power(kept), loss, powers, losses, discarded)
        refused = (
            f"no isoFLOP law: in {discarded} of {resamples} resamples some budget's losses had no minimum: the runs do "
            f"not say where it is; {REMEDY}"
        )
    _, losses, _ = _resampled(runs, [], loss, resamples, seed)
    return Fit(runs, minima, PowerLaw(math.nan, math.nan), loss, [], losses, discarded, refused)


def _resampled(
    runs: Runs, minima: Sequence[Minimum], loss: LossLaw, resamples: int, seed: int
) -> tuple[list[PowerLaw], list[LossLaw], int]:
    """Both laws fitted to draws around them, each where it is there, and how many draws lost a minimum."""
    rng = np.random.default_rng(seed)
    powers, losses, discarded = [], [], 0
    for _ in each(range(resamples), "resampling"):
        if minima:
            drawn = _around_parabolas(runs, minima, rng)
            again = [_minimum(drawn, minimum.flops) for minimum in minima]
            if not all(minimum.found for minimum in again):
                discarded += 1
                continue
            powers.append(fit_power(again))
        if not math.isnan(loss.alpha):
            losses.append(fit_loss(_around_law(runs, loss, rng), beginning=loss))
    return powers, losses, discarded


def _warn(runs: Runs, flops: float) -> None:
    """Warn that a budget is left out, and on which side of its models the best size seems to be."""
    own = runs.flops == flops
    falls = np.polyfit(np.log(runs.params[own]), runs.loss[own], 1)[0] < 0
    side, change = ("larger", "lower") if falls else ("smaller", "higher")
    log.warning(
        "budget %.3g is left out of the isoFLOP law: its losses have no minimum near the models' sizes (their parabola "
        "opens downwards or is flat) and fall towards the %s ones; add %s models with a %s --tokens-per-param, or run "
        "more --sizes or --seeds",
        flops,
        side,
        side,
        change,
    )


def fit_power(minima: Sequence[Minimum]) -> PowerLaw:
    """The least-squares line through log D over log C, for at least two budgets."""
    x = np.log([m.flops for m in minima])
    y = x - np.log([FLOPS_PER_PARAMETER * m.params for m in minima])
    exponent, constant = np.polyfit(x - x.mean(), y, 1)
    return PowerLaw(math.exp(constant - exponent * x.mean()), float(exponent))


def fit_loss(runs: Runs, beginning: LossLaw | None = None) -> LossLaw:
    """E, A, alpha, B, beta that minimise sum Huber(log L(N, D) - log loss), from a grid, or from one law.

    log L is a log-sum-exp of e, a - alpha log N and b - beta log D with E = exp(e), A = exp(a), B = exp(b), so that
    all three stay positive. BOUNDS hold what the runs leave open: a term that only one of them asks for has no end.
    """
    optimize, special = require("scipy.optimize", "scaling"), require("scipy.special", "scaling")
    log_n, log_d, log_l = np.log(runs.params), np.log(runs.tokens), np.log(runs.loss)
    bounds = np.transpose(BOUNDS)

    def residuals(p: Array) -> Array:
        e, a, alpha, b, beta = p
        return np.logaddexp(np.logaddexp(e, a - alpha * log_n), b - beta * log_d) - log_l

    if beginning is None:
        # The grid of the paper, section D.1: e, a, alpha, b, beta.
        axes = [np.linspace(-1, 1, 5), np.arange(0, 26, 5), np.linspace(0, 2, 5)]
        grid = np.stack(np.meshgrid(*axes, *axes[1:], indexing="ij"), axis=-1).reshape(-1, 5)
        order = np.argsort([special.huber(HUBER, residuals(p)).sum() for p in grid], kind="stable")
        beginnings = grid[order[:BEGINNINGS]]
    else:
        beginnings = np.clip([_point(beginning)], *bounds)  # the logarithm of a bound may lie beyond it
    ends = [
        optimize.least_squares(
            residuals, p, jac="3-point", bounds=bounds, x_scale="jac", loss="huber", f_scale=HUBER,
            ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=5000,
        )
        for p in beginnings
    ]  # fmt: skip
    e, a, alpha, b, beta = min(ends, key=lambda end: end.cost).x
    return LossLaw(math.exp(e), math.exp(a), float(alpha), math.exp(b), float(beta))


def _point(law: LossLaw) -> tuple[float, ...]:
    """A law's place in the search: e, a, alpha, b, beta."""
    return math.log(law.floor), math.log(law.a), law.alpha, math.log(law.b), law.beta


def at_bounds(law: LossLaw) -> list[str]:
    """The constants of a law that are at the bounds of their search range."""
    names = [field.name for field in dataclasses.fields(law)]
    return [
        name
        for name, value, (low, high) in zip(names, _point(law), BOUNDS, strict=True)
        if min(value - low, high - value) < 1e-6 * (high - low)
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle LEVEL per cent; NaN of none."""
    outside = (100 - LEVEL) / 2
    low, high = np.percentile(values or [math.nan], [outside, 100 - outside])
    return float(low), float(high)


def _minimum(runs: Runs, flops: float) -> Minimum:
    """The bottom of the parabola through one budget's losses; not found where it opens downwards or is nearly flat.

    It is nearly flat if its minimum is further from the middle of the runs than they are apart.
    """
    own = runs.flops == flops
    x, y = np.log(runs.params[own]), runs.loss[own]
    middle = x.mean()
    curvature, slope, constant = np.polyfit(x - middle, y, 2)
    if not curvature > 0:
        return Minimum(float(flops))
    offset = -slope / (2 * curvature)
    if not abs(offset) <= np.ptp(x):
        return Minimum(float(flops))
    at = float(middle + offset)
    loss = float(constant - curvature * offset**2)
    return Minimum(float(flops), math.exp(at), loss, float(curvature), bool(x.min() <= at <= x.max()))


def _around_parabolas(runs: Runs, minima: Sequence[Minimum], rng: np.random.Generator) -> Runs:
    """The runs, their losses those of their budget's parabola and a residual drawn from that budget's."""
    loss = runs.loss.copy()
    for minimum in minima:
        own = runs.flops == minimum.flops
        fitted = minimum.loss + minimum.curvature * (np.log(runs.params[own]) - math.log(minimum.params)) ** 2
        loss[own] = fitted + _redrawn(runs.loss[own] - fitted, 3, rng)
    return dataclasses.replace(runs, loss=loss)


def _around_law(runs: Runs, law: LossLaw, rng: np.random.Generator) -> Runs:
    """The runs, the logs of their losses those of the law and a residual drawn from all."""
    fitted = np.log([law.loss(n, d) for n, d in zip(runs.params, runs.tokens, strict=True)])
    return dataclasses.replace(runs, loss=np.exp(fitted + _redrawn(np.log(runs.loss) - fitted, 5, rng)))


def _redrawn(residuals: Array, parameters: int, rng: np.random.Generator) -> Array:
    """As many, drawn with replacement, and widened by what fitting so many parameters took from them."""
    n = len(residuals)
    return rng.choice(residuals, n) * math.sqrt(n / max(1, n - parameters))


def _check(runs: Runs) -> None:
    if len(runs.budgets) < 2:
        raise DataError(
            f"{len(runs)} runs of {len(runs.budgets)} budget{'' if len(runs.budgets) == 1 else 's'}; a law needs at "
            f"least two budgets: let the sweep finish, or give it more --budgets ({NEAR_RULE})"
        )
    for flops in runs.budgets:
        sizes = len(np.unique(runs.params[runs.flops == flops]))
        if sizes < 4:
            raise DataError(
                f"budget {flops:.3g}: models of {sizes} size{'' if sizes == 1 else 's'}; a parabola needs at least 4: "
                f"let the sweep finish, or run more --sizes ({NEAR_RULE})"
            )


def _with_intervals(law: Any, resampled: Sequence[Any]) -> dict[str, Any]:
    return {
        name: {"value": value, f"interval_{LEVEL}": interval([getattr(other, name) for other in resampled])}
        for name, value in dataclasses.asdict(law).items()
    }


def _growth(law: PowerLaw | LossLaw) -> float:
    """The exponent of N over C."""
    return 1 - law.exponent if isinstance(law, PowerLaw) else law.beta / (law.alpha + law.beta)


def _add(table: Table, name: str, value: float, resampled: Sequence[float]) -> None:
    low, high = interval(resampled)
    table.add_row(f"  {name}", _short(value), f"{_short(low)} to {_short(high)}")


def _short(value: float) -> str:
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
