"""Pages and servers call encodings by many names; the text is what a browser shows (WHATWG Encoding Standard).

The bytes and texts are written by hand after the standard's tables.
"""

import pytest
from resiliparse.parse import encoding

from arriero.curate.encodings import codec_of, decode
from arriero.curate.web import decoded, main_text

PAGES = {
    "shift_jis sjis x-sjis ms_kanji ms932 shift-jis csshiftjis windows-31j cp932": (
        b"\x83\x89\x83\x7d \x87\x40\x87\x8a\xfb\xfc \xd7\xcf \x81\x60\x81\x7c", "ラマ ①㈱髙 ﾗﾏ ～－"),
    "euc-jp x-euc-jp cseucpkdfmtjapanese eucjp": (
        b"\xa5\xe9\xa5\xde \xad\xa1\xad\xea\xfc\xe2 \x8e\xd7\x8e\xcf \xa1\xc1\xa1\xdd", "ラマ ①㈱髙 ﾗﾏ ～－"),
    "iso-2022-jp csiso2022jp": (
        b"\x1b$B%i%^\x1b(B \x1b$B-!-j|b\x1b(B \x1b(IWO\x1b(J \\~", "ラマ ①㈱髙 ﾗﾏ ¥‾"),
    "euc-kr ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 korean iso-ir-149 windows-949 cseuckr cp949 uhc": (
        b"\xb6\xf3\xb8\xb6 \x8cc\xbe\xe7\xb2\xe1", "라마 똠양꿍"),
    "gb2312 gbk x-gbk chinese gb_2312-80 iso-ir-58 csgb2312 gb18030 cp936": (
        b"\xcf\xdb\xcd\xd5 \x80 \xe9F \x810\x810 \xa8\xbc", "羡驼 € 镕 \x80 ḿ"),
    "big5 big5-hkscs cn-big5 x-x-big5 csbig5": (
        b"\xc4\xaa \xf9\xd6 \x9d\xb3 \xfd\xbb \xa1\x45 \xa3\xe1 \x87\xd3", "蘆 碁 𧨾 港 ‧ € 𢓁"),
    "tis-620 windows-874 iso-8859-11 iso8859-11 dos-874": (b"\xc5\xd2\xc1\xd2 \x80\x85", "ลามา €…"),
    "iso-8859-1 latin1 ascii us-ascii l1 cp819 windows-1252 ansi_x3.4-1968": (
        b"ma\xf1ana \x93\x80\x94 \x85", "mañana “€” …"),
    "iso-8859-9 latin5 l5 windows-1254": (b"\xfe\xf0\xdd \x80", "şğİ €"),
    "iso-8859-2 latin2 l2": (b"\xa3\xf3d\xbc", "Łódź"),
    "iso-8859-8-i logical iso-8859-8 hebrew visual": (b"\xec\xee\xe4", "למה"),
    "windows-1255": (b"\xec\xee\xe4 \xa4", "למה ₪"),
    "windows-1251 cp1251 x-cp1251": (b"\xcb\xe0\xec\xe0 \xb9 \x88", "Лама № €"),
    "koi8-r koi8": (b"\xec\xc1\xcd\xc1", "Лама"),
    "koi8-u koi8-ru": (b"\xec\xc1\xcd\xc1 \xa4\xa7\xad\xae", "Лама єїґў"),
    "ibm866 866 cp866": (b"\x8b\xa0\xac\xa0", "Лама"),
    "x-mac-cyrillic x-mac-ukrainian": (b"\x8b\xe0\xec\xe0 \xff", "Лама €"),
    "macintosh mac x-mac-roman": (b"ma\x96ana \xdb", "mañana €"),
    "x-user-defined": (b"a\x80\xff", "a\uf780\uf7ff"),
    "utf-8 utf8 unicode-1-1-utf-8 x-unicode20utf8": ("Лама".encode(), "Лама"),
    "utf-16 utf-16le ucs-2 unicode": ("Лама".encode("utf-16-le"), "Лама"),
    "utf-16be unicodefffe": ("Лама".encode("utf-16-be"), "Лама"),
    # the standard has an error in their place, for scripts may hide in them
    "iso-2022-kr csiso2022kr": (b"\x1b$)C\x0e6s86\x0f", "라마"),
    "hz-gb-2312": (b"~{O[MU~}", "羡驼"),
}  # fmt: skip


@pytest.mark.parametrize(("label", "data", "text"), [(w, *PAGES[k]) for k in PAGES for w in k.split()])
def test_a_label_means_the_superset_that_browsers_use(label, data, text):
    assert decoded(data, label) == text
    assert decoded(data, f' "{label.upper()}" ') == text


@pytest.mark.parametrize("label", ["nonsense", "hex", "utf-7", "unicode_escape", "iso-2022-cn", "émoi", "", "a\0b"])
def test_labels_of_nothing_known_are_passed_over(label):
    assert codec_of(label) is None
    assert decoded("café".encode(), label) == "café"


@pytest.mark.parametrize(
    ("label", "data", "text"),
    [
        ("shift_jis", b"\x83\x89\x81\x20\x83\x7d", "ラ\ufffd マ"),  # the second of a broken pair is kept if it is ASCII
        ("shift_jis", b"\x83\x89\x81\xff\x83\x7d", "ラ\ufffdマ"),
        ("shift_jis", b"\x83\x89\xa0\x83\x7d", "ラ\ufffdマ"),
        ("euc-jp", b"\xa5\xe9\xff\xa5\xde\xa5<", "ラ\ufffdマ\ufffd<"),
        ("euc-jp", b"\xa5\xe9\x8f\xa1\xa1\xa5\xde", "ラ\ufffdマ"),
        ("euc-kr", b"\xb6\xf3\x80\xb8\xb6\xc9\xa1", "라\ufffd마\ufffd"),
        ("gbk", b"\xcf\xdb\xff\xcd\xd5\x81<", "羡\ufffd驼\ufffd<"),
        ("big5", b"\xc4\xaa\xff\xf9\xd6\x81<", "蘆\ufffd碁\ufffd<"),
        ("iso-2022-jp", b"\x1b$B%i\xff%^\x1b(B\x1b", "ラ\ufffdマ\ufffd"),
        ("utf-8", b"\xe7\xbe\x8a\xe7\xbe<", "羊\ufffd<"),
        ("windows-1253", b"\xe1\xd2\x81", "α\ufffd\x81"),  # a free byte below 0xA0 is a control, as in Latin-1
        ("utf-16le", b"a\0\0\xd8b\0", "a\ufffdb"),
    ],
)
def test_bytes_that_fit_nowhere_cost_one_character(label, data, text):
    assert decode(data, codec_of(label)).text == text


JAPANESE = "会議は①月曜、㈱山田商店の髙橋さんが出席します。"


@pytest.mark.parametrize(("label", "codec"), [("Shift_JIS", "cp932"), ("utf-8", "utf-8"), ("gb2312", "gb18030")])
@pytest.mark.parametrize("place", [0, 4, 9])
def test_one_bad_byte_never_costs_the_page(label, codec, place):
    text = JAPANESE.replace("㈱", "") if codec == "gb18030" else JAPANESE
    data = text[:place].encode(codec) + b"\xff" + text[place:].encode(codec)
    expected = f"{text[:place]}\ufffd{text[place:]}"
    page = f'<html><head><meta charset="{label}"></head><body><main><p>'.encode() + data + b"</p></main></body></html>"
    assert decoded(data, label) == expected
    assert main_text(page, "resiliparse", "a page").strip() == expected


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ('<meta charset="utf-16">', "Łódź"),  # what was found by reading ASCII is no UTF-16
        ('<meta charset="utf-16be">', "Łódź"),
        ('<!-- <meta charset="shift_jis"> -->', "Łódź"),
        ("<style>" + "a" * 2000 + '</style><meta charset="utf-8">', "Łódź"),
        ('<meta charset="x-user-defined">', "Å\x81Ã³dÅº"),  # windows-1252
        ('<meta charset="ascii">', "Å\x81Ã³dÅº"),
    ],
)
def test_a_page_names_its_encoding_in_its_head(head, text):
    page = f"<html><head>{head}</head><body><main><p>Łódź</p></main></body></html>".encode()
    assert main_text(page, "resiliparse", "a page").strip() == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_decides_and_is_no_text(encoding):
    page = '\ufeff<html><head><meta charset="shift_jis"></head><body><main><p>Łódź</p></main></body></html>'
    assert main_text(page.encode(encoding), "resiliparse", "a page", "windows-1251") == "Łódź"
    assert decoded("\ufeffŁódź".encode(encoding), "windows-1251") == "Łódź"
    assert decoded("яю, а".encode("cp1251"), "windows-1251") == "яю, а"  # whose first bytes are those of a mark


def test_text_under_a_wrong_label_is_found_by_its_bytes():
    assert (
        decoded(JAPANESE.encode(), "shift_jis") == JAPANESE
    )  # UTF-8 that fits whole goes before a label that does not
    assert decoded(b"\xa3\xf3d\xbc", "utf-8", "iso-8859-2") == "Łódź"
    bad = "Łódź, Kraków ".encode() * 3 + b"\xff"
    assert decoded(bad, "utf-8", "iso-8859-1") == "Łódź, Kraków " * 3 + "\ufffd"  # Latin-1 would fit any bytes


def test_a_page_whose_encoding_nobody_guesses_is_windows_1252():
    """As browsers do without a word of the page's; by the library's verdict on these bytes there is no guess."""
    data = b"\x81\x8d\x8f\x90\x9d ma\xf1ana"
    assert encoding.detect_encoding(data, html5_compatible=False) is None
    assert decoded(data, None) == "\x81\x8d\x8f\x90\x9d mañana"
