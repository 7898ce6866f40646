"""What the rules need to know of a character, in any script: one table for C++ and Python, from Python's Unicode data.

`classes()[code point]` is a set of bits; `fold()[code point]` is the character as near-duplicate search sees it: lower
case, without its accents, every digit as "0", and 0 for what is dropped (punctuation, symbols, marks, spaces). Both are
made once a process, in about 0.2 s, and cover the planes in which Unicode has letters; beyond is nothing (`LIMIT`).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LIMIT = 0x32400  # no character at or above it is a letter, a space or punctuation; those count as LIMIT - 1, unassigned

SPACE = 1 << 0
"""`str.isspace`"""
ALPHA = 1 << 1
"""`str.isalpha`"""
ALNUM = 1 << 2
"""`str.isalnum`"""
DIGIT = 1 << 3
"""`str.isdecimal`"""
UPPER = 1 << 4
"""A capital, or a letter of a script without case: such may stand for either in the rules about full stops."""
LOWER = 1 << 5
"""A small letter, or a letter of a script without case."""
SYMBOL = 1 << 6
"""Punctuation, symbols and control characters: a token of these alone is no word."""
PREFIX = 1 << 7
"""Comes off the beginning of a token."""
SUFFIX = 1 << 8
"""Comes off the end of a token."""
ICON = 1 << 9
"""A pictograph (category So): a token of its own wherever it stands."""
CURRENCY = 1 << 10
"""A currency sign: comes off the beginning, and off the end after a digit."""
HYPHEN = 1 << 11
"""Parts two words where it stands between them."""
UNSPACED = 1 << 12
"""A letter of a script written without spaces: a word of its own, for want of a dictionary."""
TERMINAL = 1 << 13
"""Ends a sentence (Unicode's Sentence_Terminal): . ! ? and their like in other scripts."""
APOSTROPHE = 1 << 14
"""Begins the tail of a contraction: ' or ’."""
QUOTE = 1 << 15
"""A quotation mark."""

# PropList.txt of Unicode 16, which `unicodedata` leaves out, and the Khmer signs that spaCy and datatrove add
_TERMINAL = """
21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6 17D9-17DA
1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 2024 203C-203D 2047-2049
2CF9-2CFB 2E2E 2E3C 2E53-2E54 2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F
AAF0-AAF1 ABEB FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048
110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 113D4-113D5 1144B-1144C 115C2-115C3
115C9-115D7 11641-11642 1173C-1173E 11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F
16AF5 16B37-16B38 16B44 16D6E-16D6F 16E98 1BC9F 1DA88
"""
# Thai, Lao, Tibetan, Myanmar, Khmer, New Tai Lue to Tai Tham, kana, Han
_UNSPACED = """
E00-EDF F00-FFF 1000-109F 1780-17FF 1950-1AAF 3040-30FF 31F0-31FF 3005-3007 3400-4DBF 4E00-9FFF A9E0-A9FE AA60-AA7F
F900-FAFF FF66-FF9F 1B000-1B16F 20000-323AF
"""
_ASCII_PREFIX = "%=+,:;!?()[]{}<>_#*&'\"`$"
_ASCII_SUFFIX = ",:;!?()[]{}<>_#*&'\"`"


@functools.cache
def classes() -> NDArray[np.uint16]:
    """The bits above for each code point below LIMIT."""
    text = _every_character()
    category = np.array(list(map(unicodedata.category, text)))
    kind = np.array([c[0] for c in category])
    letter = _ask(str.isalpha, text)
    uncased = letter & np.isin(category, ["Lo", "Lm"])
    bits = np.zeros(LIMIT, np.uint16)
    punctuation, ascii_ = kind == "P", np.arange(LIMIT) < 128
    icon, currency = category == "So", category == "Sc"
    unspaced = _members(_UNSPACED) & letter
    for bit, mask in (
        (SPACE, _ask(str.isspace, text)),
        (ALPHA, letter),
        (ALNUM, _ask(str.isalnum, text)),
        (DIGIT, _ask(str.isdecimal, text)),
        (UPPER, _ask(str.isupper, text) | uncased),
        (LOWER, _ask(str.islower, text) | uncased),
        (SYMBOL, punctuation | (kind == "S") | (category == "Cc")),
        (PREFIX, np.where(ascii_, _characters(_ASCII_PREFIX), punctuation | icon | currency)),
        (SUFFIX, np.where(ascii_, _characters(_ASCII_SUFFIX), punctuation | icon)),
        (ICON, icon),
        (CURRENCY, currency),
        (HYPHEN, _characters("-–—~")),
        (UNSPACED, unspaced),
        (TERMINAL, _members(_TERMINAL)),
        (APOSTROPHE, _characters("'’")),
        (QUOTE, _characters("'\"`´‚„") | np.isin(category, ["Pi", "Pf"])),
    ):
        bits[mask] |= bit
    return bits


@functools.cache
def fold() -> NDArray[np.uint32]:
    """What each code point below LIMIT is to near-duplicate search; 0 where it is dropped."""
    folded = np.arange(LIMIT, dtype=np.uint32)
    bits, text = classes(), _every_character()
    for point in np.flatnonzero(bits & (UPPER | LOWER)).tolist():
        if not bits[point] & UNSPACED and not 0xAC00 <= point < 0xD7A4:  # Hangul syllables decompose into letters
            bare = [c for c in unicodedata.normalize("NFD", text[point].lower()) if not unicodedata.combining(c)]
            folded[point] = ord(bare[0]) if bare else 0
    folded[(bits & DIGIT) > 0] = ord("0")
    folded[(bits & ALNUM) == 0] = 0
    return folded


def _every_character() -> str:
    return "".join(map(chr, range(LIMIT)))


def _ask(method: Callable[[str], bool], text: str) -> NDArray[np.bool_]:
    return np.fromiter(map(method, text), np.bool_, len(text))


def _characters(which: str) -> NDArray[np.bool_]:
    mask = np.zeros(LIMIT, bool)
    mask[[ord(c) for c in which]] = True
    return mask


def _members(ranges: str) -> NDArray[np.bool_]:
    """Whether each code point is in one of the hexadecimal ranges."""
    mask = np.zeros(LIMIT, bool)
    for part in ranges.split():
        low, _, high = part.partition("-")
        mask[int(low, 16) : int(high or low, 16) + 1] = True
    return mask
