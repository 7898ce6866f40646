r"""Numbers in a text, read exactly: 1,234,567.5, -3/4, 1 1/2, \frac{3}{4}, 1.2e3, 1.2 \times 10^{3}, 50%.

Values are fractions, so that equality is exact and needs no tolerance. Two roundings are allowed, and they are the only
ones: a value without a finite decimal form, such as 1/3, equals a decimal of at least three places that it rounds to;
and 50% equals 50 and 0.5, as both are written for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_PLACES = 3  # decimal places that a rounded value must have at least
_LONGEST = 60  # digits of a number, and size of an exponent: no answer has more, and Python takes long over them

_SPACES = re.compile(r"(?<=\d)(?:\\[,;!: ]|\{,\}|[\u00a0\u202f\u2009])(?=\d{3}(?!\d))")  # 1\,234 and 1{,}234
_FRACTION = re.compile(r"(-?)\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}\s*\{\s*(-?[\d.]+)\s*\}|(\d)\s*(\d))")
_POWER = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|×|\*)\s*10\s*(?:\^|\*\*)\s*\{?\s*(-?\d+)\s*\}?")
_NUMBER = re.compile(
    r"""(?<![\w.])(?P<sign>[-+]?)\$?\s?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:_\d+)*)?(?P<decimals>\.\d+)?(?:[eE](?P<power>[-+]?\d+))?
        (?:(?P<mixed>\s\d+\s?/\s?\d+)|\s?/\s?(?P<below>\d+(?:\.\d+)?))?
        \s?(?P<percent>\\?%)?(?![\w])""",
    re.VERBOSE,
)
_OR = re.compile(
    r"^[\s$*.`]*(?:,?\s*(?:or|and|maybe|perhaps|possibly|alternatively|vs|versus)\b.{0,24}|[,;|/]\s*)$", re.I
)


@dataclass(frozen=True)
class Number:
    """A number in a text: its value, decimal places as written, whether a % follows, and where it stands."""

    value: Fraction
    places: int
    percent: bool
    start: int
    end: int


def numbers(text: str) -> list[Number]:
    """Every number in a text, in order; places in it refer to the text in plain form (`_plain`)."""
    return [number for match in _NUMBER.finditer(_plain(text)) if (number := _read(match)) is not None]


def number(text: str) -> Number | None:
    """The number that a text states: its last one; None where there is none, or it is hedged ("12 or 13")."""
    found = numbers(text)
    if not found:
        return None
    last = found[-1]
    if len(found) > 1 and _OR.match(_plain(text)[found[-2].end : last.start]) and not equal(found[-2], last):
        return None
    return last


def equal(a: Number, b: Number) -> bool:
    """Whether two numbers are the same value."""
    if a.value == b.value or _rounds(a, b) or _rounds(b, a):
        return True
    if a.percent != b.percent:
        whole, part = (a, b) if a.percent else (b, a)
        return whole.value / 100 == part.value
    return False


def _rounds(exact: Number, written: Number) -> bool:
    """Whether a value without a finite decimal form was written in decimals."""
    if written.places < _PLACES or _is_decimal(exact.value):
        return False
    return round(exact.value, written.places) == written.value


def _is_decimal(value: Fraction) -> bool:
    below = value.denominator
    for factor in (2, 5):
        while below % factor == 0:
            below //= factor
    return below == 1


def _plain(text: str) -> str:
    """The text with LaTeX's and Unicode's ways to write numbers in plain characters."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\left", "").replace("\\right", "")
    text = _SPACES.sub("", text)
    text = _FRACTION.sub(lambda m: f"{m[1]}{m[2] or m[4]}/{m[3] or m[5]}", text)
    return _POWER.sub(lambda m: f"e{m[1]}", text)


def _read(match: re.Match[str]) -> Number | None:
    whole, decimals = match["whole"] or "", match["decimals"] or ""
    if not (whole or decimals) or len(match[0]) > _LONGEST or abs(int(match["power"] or 0)) > _LONGEST:
        return None
    sign = -1 if match["sign"] == "-" else 1
    value = Fraction(Decimal(whole.replace(",", "").replace("_", "") + decimals + f"e{match['power'] or 0}"))
    if match["mixed"]:
        above, below = map(int, match["mixed"].split("/"))
        if decimals or below == 0:
            return None
        value += Fraction(above, below)
    elif match["below"]:
        if (below_value := Fraction(match["below"])) == 0:
            return None
        value /= below_value
    return Number(sign * value, max(len(decimals) - 1, 0), bool(match["percent"]), match.start(), match.end())
