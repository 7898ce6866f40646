"""Which licence a source file is under, by what its row or its first lines say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from arriero.curate.batch import Batch, Result, with_meta
from arriero.curate.document import Document

LOOKED_AT = 8000  # characters from the beginning: long licence texts stand whole in a header
SPDX = re.compile(r"SPDX-License-Identifier:\s*\(?([\w.+-]+)", re.IGNORECASE)
# The first that matches names the licence: the stricter ones stand before those whose words they share.
PHRASES = tuple(
    (name, re.compile(r"\s+".join(words.split(" ")), re.IGNORECASE))
    for name, words in (
        ("agpl", "affero general public licen[sc]e"),
        ("lgpl", "(lesser|library) general public licen[sc]e"),
        ("gpl", "general public licen[sc]e"),
        ("mpl", "mozilla public licen[sc]e"),
        ("epl", "eclipse public licen[sc]e"),
        ("apache", "apache licen[sc]e,? version 2"),
        ("apache", "licensed to the apache software foundation"),
        ("psf", "(psf|python software foundation) licen[sc]e"),
        ("psf", "licensed to psf under a contributor agreement"),
        ("bsd", "redistribution and use in source and binary forms"),
        ("bsd", "bsd[- ]style licen[sc]e"),
        ("isc", "permission to use, copy, modify, and(/or)? distribute this software for any purpose"),
        ("mit", "permission is hereby granted, free of charge, to any person obtaining a copy"),
        ("mit", "(under|the) (the )?mit licen[sc]e"),
        ("unlicense", "released into the public domain|this is free and unencumbered software"),
        ("proprietary", "all rights reserved[.,]? (unauthori[sz]ed|proprietary|confidential)"),
        ("proprietary", "proprietary and confidential"),
    )
)  # fmt: skip
_COMMENT = re.compile(r"^[ \t]*(?:#+|//+|\*+|--|;+|%+|\"\"\"|/\*+)?[ \t]*", re.MULTILINE)


@dataclass(frozen=True)
class Licence:
    """Keep source files under free licences; writes "licence" into each document's meta where one is found.

    Llama 1 kept projects under the Apache, BSD and MIT licences (arXiv 2302.13971, section 2.1). The row's own column
    (license, licenses) counts before the file's text. Costs about 0.1 ms a document.
    """

    name: ClassVar[str] = "licence"

    keep: tuple[str, ...] = ("apache", "bsd", "mit", "isc", "psf", "unlicense", "cc0", "0bsd", "zlib", "python")
    """Licences to keep: how their names begin, in lower case ("bsd" covers BSD-3-Clause)."""
    keep_unknown: bool = True
    """Whether to keep files that name no licence, since it often stands in another file of the project."""

    def run(self, batch: Batch) -> Result:
        """Each document with its licence, dropped where that is none of those to keep."""
        results: Result = []
        for document in batch.documents:
            found = licences(document)
            if found:
                document = with_meta(document, licence=", ".join(found))
            if not found:
                results.append((document, None if self.keep_unknown else "licence: none found"))
            elif all(name.startswith(self.keep) for name in found):
                results.append((document, None))
            else:
                results.append((document, f"licence: {', '.join(found)}"))
        return results


def licences(document: Document) -> list[str]:
    """The licences that a document's row names, else that its first lines name, in lower case."""
    for column in ("licence", "license", "licenses", "max_stars_repo_licenses"):
        named = document.meta.get(column)
        if named:
            return [str(name).strip().lower() for name in (named if isinstance(named, list) else [named])]
    head = document.text[:LOOKED_AT]
    if spdx := SPDX.search(head):
        return [spdx[1].lower()]
    plain = _COMMENT.sub("", head)
    return next(([name] for name, phrase in PHRASES if phrase.search(plain)), [])
