"""The figure of a fit: each budget's losses with its parabola, and the best size over compute by both laws."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from arriero.show.page import LIGHT, Theme, dress, png
from arriero.train.scaling.fit import LEVEL, Fit, Minimum, interval


def fit_png(fit: Fit, theme: Theme = LIGHT) -> bytes:
    """Draw a fit; returns a PNG."""
    figure = Figure(figsize=(11, 4.6), dpi=160, facecolor=theme.background, layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, fit, theme)
    _sizes(right, fit, theme)
    dress((left, right), theme)
    for axes in (left, right):
        axes.tick_params(which="minor", length=0)
        axes.xaxis.label.set_color(theme.text)
        axes.yaxis.label.set_color(theme.text)
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=8)
    return png(figure)


def _losses(axes: Any, fit: Fit, theme: Theme) -> None:
    shades = colormaps["viridis"](np.linspace(0.1, 0.85, len(fit.minima)))
    for minimum, shade in zip(fit.minima, shades, strict=True):
        own = fit.runs.flops == minimum.flops
        params = fit.runs.params[own]
        axes.plot(params, fit.runs.loss[own], "o", color=shade, markersize=4.5, label=f"{minimum.flops:.2g} FLOPs")
        x = np.geomspace(min(params.min(), minimum.params), max(params.max(), minimum.params), 97)
        axes.plot(x, _parabola(minimum, x), color=shade, linewidth=1.5)
        axes.plot(minimum.params, minimum.loss, "X", color=theme.second, markersize=8)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("held-out loss (nats per token)")


def _parabola(minimum: Minimum, params: Any) -> Any:
    return minimum.loss + minimum.curvature * np.log(params / minimum.params) ** 2


def _sizes(axes: Any, fit: Fit, theme: Theme) -> None:
    budgets = [minimum.flops for minimum in fit.minima]
    x = np.geomspace(budgets[0] / 3, budgets[-1] * 30, 97)
    if fit.powers:
        band = np.array([interval([law.params(c) for law in fit.powers]) for c in x])
        axes.fill_between(x, *band.T, color=theme.first, alpha=0.18, linewidth=0, label=f"{LEVEL}% of resamples")
        axes.plot(x, [fit.power.params(c) for c in x], color=theme.first, linewidth=2, label="isoFLOP law")
    if fit.losses:
        axes.plot(x, [fit.loss.params(c) for c in x], "--", color=theme.text, linewidth=1.5, label="parametric law")
    axes.plot(budgets, [m.params for m in fit.minima], "X", color=theme.second, markersize=8, label="minima")
    axes.set_xscale("log")
    if fit.powers or fit.losses or any(m.found for m in fit.minima):  # else there is nothing to scale
        axes.set_yscale("log")
    axes.set_xlabel("compute (FLOPs)")
    axes.set_ylabel("best number of parameters")
