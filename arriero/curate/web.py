"""Extracts the text of a web page: detects its encoding and leaves out menus and other boilerplate."""

from __future__ import annotations

import codecs
import re
from typing import Literal

from arriero.curate.depth import flattened
from arriero.curate.encodings import codec_of, decode, fits_all
from arriero.errors import DataError, UserError, require
from arriero.tokenizer.base import well_formed

Extractor = Literal["resiliparse", "trafilatura"]


def main_text(data: bytes, extractor: Extractor, where: str, charset: str | None = None) -> str:
    """The main text of a page, without menus, headers and the like. charset: of the HTTP header."""
    try:
        page = flattened(decoded(data, charset, declaration(data)))
        if extractor == "trafilatura":
            found = require("trafilatura", "data").extract(page, include_comments=False, include_tables=True)
            return found or ""
        extract = require("resiliparse.extract.html2text", "data").extract_plain_text
        return extract(page, main_content=True, alt_texts=False, list_bullets=True)
    except UserError as error:
        raise type(error)(f"{where}: {error}; remove the page") from error
    except Exception as error:  # RecursionError is one
        raise DataError(f"{where}: the HTML cannot be parsed ({error}); remove the page") from error


DECLARED = re.compile(
    rb"""<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)
COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
END_OF_HEAD = re.compile(rb"<body\b|</head\b", re.IGNORECASE)
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16le", codecs.BOM_UTF16_BE: "utf-16be"}
NEARLY = (
    1 / 3
)  # share of broken characters up to which a label is believed; text of another encoding read as UTF-8 has more


def declaration(page: bytes) -> str | None:
    """The encoding that a page names for itself, in its first kilobyte or its head."""
    end = END_OF_HEAD.search(page, 0, 1 << 16)
    head = COMMENT.sub(b"", page[: max(1024, end.start() if end else 0)])
    found = DECLARED.search(head)
    label = found[1].decode("ascii", "replace") if found else None
    if label and label.lower() == "x-user-defined":
        return "windows-1252"
    codec = codec_of(label) if label else None
    # What was found by reading ASCII is in no encoding of two bytes a character.
    return "utf-8" if codec and codec.name.startswith("utf-16") else label


def decoded(data: bytes, charset: str | None, declared: str | None = None) -> str:
    """Text by its byte order mark, its HTTP header, its own declaration, as UTF-8, or as its bytes suggest.

    The first of these that all bytes fit. Where none is, the first that nearly all fit, and a byte that does not costs
    one character; an encoding that any bytes fit does not go before that, nor does a guess, which errs where few
    characters are not ASCII.
    """
    mark, marked = next((pair for pair in BYTE_ORDER_MARKS.items() if data.startswith(pair[0])), (b"", None))
    nearly = None
    for label in dict.fromkeys(filter(None, [marked, charset, declared, "utf-8"])):
        codec = codec_of(label)
        if codec is None or (nearly is not None and fits_all(codec)):
            continue
        text, broken = decode(data.removeprefix(mark) if label == marked else data, codec)
        if not broken:
            return well_formed(text)
        if nearly is None and broken <= NEARLY:
            nearly = text
    if nearly is not None:
        return well_formed(nearly)
    encoding = require("resiliparse.parse.encoding", "data")
    guess = codec_of(encoding.detect_encoding(data, html5_compatible=False) or "windows-1252") or codec_of(
        "windows-1252"
    )
    assert guess is not None
    return well_formed(decode(data, guess).text)
