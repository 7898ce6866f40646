"""Normalises texts that look the same to one form: NFC, line ends, no invisible characters."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import ClassVar

from arriero.curate.batch import Batch, Result, with_text

# Joiners (200C, 200D) stay: Persian, Indic scripts and emoji are spelled with them; so do marks of direction.
INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x2060, 0xFEFF, *range(0xFFF9, 0xFFFC)])
CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
REMOVED = INVISIBLE | CONTROL
_ANY_REMOVED = re.compile("[" + "".join(map(re.escape, map(chr, REMOVED))) + "]")


@dataclass(frozen=True)
class Normalise:
    """Bring texts to one form; a text with nothing left is dropped. Costs about 2 ms for a million characters."""

    name: ClassVar[str] = "normalise"

    nfc: bool = True
    """Compose characters (Unicode NFC): "é" is one code point however it was typed."""
    invisible: bool = True
    """Remove control characters but tab and newline, soft hyphens, zero-width spaces and byte-order marks."""
    blank_lines: int = 2
    """Most blank lines in a row; 0 leaves them as they are. Source code is left as it is."""

    def run(self, batch: Batch) -> Result:
        """Each document in its one form."""
        results: Result = []
        for document in batch.documents:
            text = self.text(document.text, batch.is_code)
            results.append((with_text(document, text), None if text else "empty"))
        return results

    def text(self, text: str, is_code: bool = False) -> str:
        """One text in its one form: it starts with no blank line, and ends without white space."""
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.invisible and _ANY_REMOVED.search(text):
            text = text.translate(REMOVED)
        if self.nfc and not text.isascii():
            text = unicodedata.normalize("NFC", text)
        if self.blank_lines and not is_code:
            allowed = self.blank_lines + 1
            text = re.sub(rf"\n(?:[ \t]*\n){{{allowed},}}", "\n" * allowed, text)
        return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()
