"""Flattens pages that nest too deeply, before a parser sees them.

Finding a page's main text takes time quadratic in how deeply its <div>s nest (16,000 of them: 8 s), and lxml fails at
256 levels. Browsers have a limit too (Blink 512). `flattened` replaces tags that would nest deeper than 128 by line
breaks, in the page's text. Every node costs its depth, so a limit of 512 would cost four times as much, and moving deep
elements beside their parent, as Blink does, hundreds of times. A tag with very many attributes is quadratic likewise.

Price: C++ scans a page at 0.7 GB/s; where it cannot be compiled, Python at 0.05 GB/s, with the same result.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections import Counter
from pathlib import Path

from arriero.errors import DataError
from arriero.system.cpp import load_cpp

TAG = re.compile(
    rb"<(?:!--.*?(?:-->|\Z)|(?i:(script|style|textarea|title|xmp)\b.*?(?:</\1|\Z))|(/?)([a-zA-Z][^\s/>]*)([^>]*)>?)",
    re.DOTALL,
)
# Elements that hold none, or that end where the next of them begins.
FLAT = (
    b"area base br col embed hr img input link meta param source track wbr "
    b"p li dt dd tr td th thead tbody tfoot colgroup option optgroup"
)
WALLS = b"applet button caption marquee object table template"  # no end tag reaches out of them
DEEPEST = 128  # levels of elements
MOST_TAGS = 500_000  # a parsed page takes some 500 bytes for each
MOST_ATTRIBUTES = 2_000  # of one tag: parsers compare each with all before it


def flattened(page: str, deepest: int = DEEPEST) -> str:
    """The page with at most `deepest` elements within one another: tags of deeper ones become line breaks.

    Raises `DataError` for more tags than any page has, and for more attributes of one.
    """
    if (n_tags := page.count("<")) > MOST_TAGS:
        raise DataError(f"it has {n_tags:,} tags; {MOST_TAGS:,} are too many")
    data, library = page.encode(), load_library()
    if library is not None and not library.exceeds(
        data, ctypes.c_int64(len(data)), ctypes.c_int64(deepest), ctypes.c_int64(MOST_ATTRIBUTES), FLAT, WALLS
    ):
        return page
    return _without_depth(data, deepest).decode()


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled look, or None where it cannot be compiled."""
    return load_cpp(Path(__file__).with_suffix(".cpp"), "looking for deep pages in Python, ten times slower")


def _without_depth(page: bytes, deepest: int) -> bytes:
    flat, walls = frozenset(FLAT.split()), frozenset(WALLS.split())
    parts: list[bytes] = []
    open_: list[bytes] = []  # elements, the outermost first
    hidden: Counter[bytes] = Counter()  # those that are too deep, and whose end tags have not come yet
    done = 0
    for tag in TAG.finditer(page):
        if tag[3] is None:  # a comment or a script
            continue
        if (n_attributes := len(tag[4].split())) > MOST_ATTRIBUTES:
            raise DataError(f"a tag has {n_attributes:,} attributes; {MOST_ATTRIBUTES:,} are too many")
        name, begins = tag[3].lower(), not tag[2]
        is_full = len(open_) == deepest
        if name in flat and not (is_full and parts):
            continue
        if begins and not is_full:
            open_.append(name)
        elif begins or hidden[name] or name in flat:
            if name not in flat:
                hidden[name] += 1 if begins else -1
            text = page[done : tag.start()]
            parts += [text, b"<br>"] if not parts or text.strip() else []
            done = tag.end()
        elif name in open_:
            _close(open_, name, walls)
    return b"".join([*parts, page[done:]])


def _close(open_: list[bytes], name: bytes, walls: frozenset[bytes]) -> None:
    """Close an element and those open within it, unless one of `walls` is between them."""
    for i in range(len(open_) - 1, -1, -1):
        if open_[i] == name:
            del open_[i:]
            return
        if open_[i] in walls:
            return
