"""Encodings of web pages by their labels, decoded as browsers do (WHATWG Encoding Standard).

A label means the superset that browsers use: Shift_JIS is cp932, EUC-KR cp949, GB2312 gb18030, Big5 has HKSCS, TIS-620
is cp874, Latin-1 cp1252. `webencodings` has the table of labels. The decoders are Python's; differences to the standard
are handled here: byte pairs that only the standard maps, and how many bytes an invalid sequence takes. A broken pair
becomes one replacement character, or, where its second byte is ASCII, its first byte alone does.

Price: a page that Python's codec decodes without errors costs no more; some are searched for one character.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

from arriero.errors import require

HANDLER = "arriero-web"  # what Python knows `_replaced` as
BAD = "\ufffd"
UNFIT = frozenset({"idna", "punycode", "raw-unicode-escape", "unicode-escape", "undefined", "utf-7"})  # never a page's
SINGLE_BYTE = re.compile("cp(?:125|4|8)|iso8859|koi8|mac|x-user")


class Decoded(NamedTuple):
    """A text, and the fraction of its non-ASCII characters that replace undecodable bytes."""

    text: str
    broken: float


@cache
def codec_of(label: str) -> codecs.CodecInfo | None:
    """The codec of a label; None for an unknown label.

    The standard refuses some (ISO-2022-KR, HZ), because they can hide scripts, which does not matter here: they are
    decoded if Python can, as are labels that only Python knows.
    """
    label = label.strip("\"'\t\n\f\r ")
    try:
        known = require("webencodings", "data").lookup(label)
        if known is not None and known.name != "replacement":
            return codecs.lookup("gb18030") if known.name == "gbk" else known.codec_info
        b" ".decode(label, "replace")  # LookupError for codecs that give no text
        codec = codecs.lookup({"csiso2022kr": "iso2022_kr", "hz-gb-2312": "hz"}.get(label.lower(), label))
    except (LookupError, ValueError):  # UnicodeError is one
        return None
    return None if codec.name.replace("_", "-") in UNFIT else codec


def fits_all(codec: codecs.CodecInfo) -> bool:
    """Whether any bytes are text in it, so that decoding them proves nothing."""
    return SINGLE_BYTE.match(codec.name) is not None


def decode(data: bytes, codec: codecs.CodecInfo) -> Decoded:
    """The text that a browser finds in the data."""
    text = _iso_2022_jp(data) if codec.name == "iso2022_jp" else codec.decode(data, HANDLER)[0]
    if codec.name in OTHERWISE:
        text = text.translate(OTHERWISE[codec.name])
    bad = text.count(BAD)
    return Decoded(text, bad / (len(text) - len(text.encode("ascii", "ignore"))) if bad else 0.0)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """The replacement for bytes that a codec cannot decode, and the position at which it continues."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    data, at, encoding = error.object, error.start, error.encoding
    if encoding == "charmap":  # bytes that a Windows code page leaves free are the controls of Latin-1
        return chr(data[at]) if data[at] < 0xA0 else BAD, at + 1
    if encoding not in LEADS:
        return BAD, error.end
    pair = data[at : at + 2]
    if encoding == "gb18030" and data[at] == 0x80:
        return "€", at + 1
    if encoding == "gb18030" and FOUR_BYTES.match(data, at):
        return BAD, at + 4
    if encoding == "big5hkscs" and pair in BIG5:
        return BIG5[pair], at + 2
    if encoding == "euc_jp" and (text := _of_cp932(pair)):
        return text, at + 2
    length = 3 if encoding == "euc_jp" and pair[0] == 0x8F and pair[1:] > b"\xa0" else 2
    is_pair = data[at] in LEADS[encoding] and len(pair) == 2
    return BAD, at + (min(length, _not_ascii(data[at : at + length])) if is_pair else 1)


def _not_ascii(data: bytes) -> int:
    """The number of bytes before the first ASCII one."""
    return next((i for i, byte in enumerate(data) if byte < 0x80), len(data))


def _of_cp932(pair: bytes) -> str:
    """What cp932 has in this place of JIS X 0208 (given as in EUC-JP), or nothing: ①, ㈱ and other additions of NEC and
    IBM."""
    if len(pair) < 2 or not (0xA1 <= pair[0] <= 0xFE and 0xA1 <= pair[1] <= 0xFE):
        return ""
    row, cell = pair[0] - 0xA1, pair[1] - 0xA1  # two rows of 94 share a lead byte
    lead = row // 2 + (0x81 if row < 62 else 0xC1)
    trail = cell + (0x9F if row % 2 else 0x40 if cell < 63 else 0x41)
    try:
        return bytes((lead, trail)).decode("cp932")
    except UnicodeDecodeError:
        return ""


ESCAPES = re.compile(rb"\x1b([(][BJI]|[$][@B])")


def _iso_2022_jp(data: bytes) -> str:
    """Python's codec lacks the additions of NEC and IBM, and katakana of half width, which the standard reads."""
    texts, parts = [], ESCAPES.split(data)
    for escape, part in zip([b"(B", *parts[1::2]], parts[0::2], strict=True):
        if escape == b"(I":
            texts.append("".join(chr(byte + 0xFF40) if 0x21 <= byte <= 0x5F else BAD for byte in part))
        elif escape in (b"(B", b"(J"):
            text = part.decode("ascii", "replace").translate(dict.fromkeys((0x0E, 0x0F, 0x1B), BAD))
            texts.append(text.translate({0x5C: "¥", 0x7E: "‾"}) if escape == b"(J" else text)
        else:
            eight_bits = bytes(byte | 0x80 if 0x21 <= byte <= 0x7E else byte if byte < 0x80 else 0xFF for byte in part)
            texts.append(decode(eight_bits, codecs.lookup("euc_jp")).text)
    return "".join(texts)


LEADS: dict[str, Collection[int]] = {
    "cp932": range(0x81, 0xFD),
    "cp949": range(0x81, 0xFF),
    "gb18030": range(0x81, 0xFF),
    "big5hkscs": range(0x81, 0xFF),
    "euc_jp": (0x8E, 0x8F, *range(0xA1, 0xFF)),
}
FOUR_BYTES = re.compile(rb"[\x81-\xfe][0-9][\x81-\xfe][0-9]")  # of gb18030

# What the standard has in some places where Python's codecs have something else.
OTHERWISE: dict[str, Mapping[int, Any]] = {
    "cp932": str.maketrans(dict.fromkeys("\uf8f0\uf8f1\uf8f2\uf8f3", BAD)),
    "koi8-u": str.maketrans("╝╬", "ўЎ"),
    "big5hkscs": str.maketrans("•､‾∼♁☉¥¢£", "‧﹑¯～⊕⊙￥￠￡"),
    "euc_jp": str.maketrans("〜‖−¢£¬", "～∥－￠￡￢"),
    "gb18030": str.maketrans(  # of 2022; what Python's, of 2000, has in an area for private use
        "\ue5e5\ue7c7\ue78d\ue78e\ue78f\ue790\ue791\ue792\ue793\ue794\ue795\ue796"
        "\ue81e\ue826\ue82b\ue82c\ue832\ue843\ue854\ue864",
        "\u3000ḿ︐︒︑︓︔︕︖︗︘︙龴龵龶龷龸龹龺龻",
    ),
}

# Pairs of Big5 that Python's HKSCS (of 2004) lacks: runs of them by their first, and single ones.
_RUNS = {
    0x877A: "㡵𡵓𣚞𦀡㻬",
    0x87A1: "𥣞㫵竼龗𤅡𨤍𣇪𠪊𣉞䌊蒄龖鐯䤰蘓墖靊鈘秐稲晠権袝瑌篅枂稬剏遆㓦珄"
    "𥶹瓆鿇垳䤯呌䄱𣚎堘穲𧭥讏䚮𦺈䆁𥶙箮𢒼鿈𢓁𢓉𢓌鿉蔄𣖻䂴鿊䓡𪷿拁灮鿋",
    0x92AF: "兙兛兝兞",
    0xA3C0: "␀␁␂␃␄␅␆␇␈␉␊␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟␡€",
}
_SINGLE = (
    "8e69箸 8e6f簆 8e7e糎 8eab緒 8eb4縝 8ecd者 8ed0耨 8f57菁 8f69蒨 8f6e萏 8fcb覦 8fcc覩 8ffe起 906d都 907a銹 90dc靜 "
    "90f1響 91bf鼖 9244蔃 92c8鍮 92d1瑹 9447浧 94ca禛 95d9邗 9644靝 96ed瀞 96fc嬨 9b76爁 9b78矗 9b7b纇 9bc6駖 9bde釔 "
    "9bec惞 9bf6澶 9c42輶 9c53侻 9c62營 9c68鄄 9c6b鷰 9c77菏 9cbc尐 9cbd秣 9cd0婧 9d57輋 9d5a筑 9dc4拐 9ea9恢 9eef痹 "
    "9efd汊 9f60鬮 9f66鼗 9fcb僭 9fd8弌 a063蠏 a077拎 a0d5瑨 a0df煢 a0e4牐 c6cf廴 c6d3无 c6d5癶 c6d7隶 c6de〃 c6df仝 "
    "fa5f倩 fa66偽 fabd包 fac5卄 fad5卿 fb48嘅 fbb8婷 fbf3幵 fbf9廐 fc4f彘 fc6c悤 fcb9撐 fce2晴 fcf1杞 fdb7沜 fdb8渝 "
    "fdbb港 fdf1煮 fe52猪 fe6f瑜 feaa瓩 fedd砉"
)
BIG5 = {(first + i).to_bytes(2, "big"): char for first, run in _RUNS.items() for i, char in enumerate(run)} | {
    bytes.fromhex(pair[:4]): pair[4:] for pair in _SINGLE.split()
}

codecs.register_error(HANDLER, _replaced)
