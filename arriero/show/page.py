"""The common parts of the HTML reports: the style of a page, its template, and the colours of its figures.

A report is one self-contained HTML file: styles and pictures are embedded.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, on a light or a dark page."""

    background: str
    text: str
    grid: str
    first: str
    second: str


LIGHT = Theme("#ffffff", "#3d3a35", "#e8e4dc", "#2f6f8f", "#c4622d")
DARK = Theme("#211f1c", "#cfc8bc", "#37332e", "#6fb3d2", "#e8935f")


def template(package: str, name: str) -> Any:
    """A Jinja template of a package; `style` in it is the common style sheet."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = Markup(_text("arriero.show", "page.html").strip())
    return environment.from_string(_text(package, name))


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def dress(axes: Iterable[Axes], theme: Theme) -> None:
    """Give axes the look of the page: a grid behind, no frame."""
    for one in axes:
        one.set_facecolor(theme.background)
        one.grid(color=theme.grid, linewidth=0.8)
        one.set_axisbelow(True)
        one.tick_params(colors=theme.text, length=0)
        one.spines[:].set_visible(False)


def png(figure: Figure) -> bytes:
    """A figure as a picture."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a model's name, which is drawn as boxes then
        figure.savefig(out, format="png")
    return out.getvalue()


def both_themes(draw: Callable[[Theme], bytes]) -> dict[str, str]:
    """A picture for a light and a dark page, in base64: {"light": ..., "dark": ...}."""
    return {name: base64.b64encode(draw(theme)).decode() for name, theme in (("light", LIGHT), ("dark", DARK))}
