"""Determines the licence of a source file from its row's metadata or its first lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from arriero.curate.batch import Batch, Result, with_meta
from arriero.curate.document import Document
from arriero.errors import ConfigError

LOOKED_AT = 8000  # characters from the beginning: long licence texts stand whole in a header
SPDX = re.compile(r"SPDX-License-Identifier:\s*\(?([\w.+-]+)", re.IGNORECASE)
# The first one found in the text names the licence: stricter ones come before those whose words they share.
PHRASES = (
    ("agpl", ("affero general public licen",)),
    ("lgpl", ("lesser general public licen", "library general public licen")),
    ("gpl", ("general public licen",)),
    ("mpl", ("mozilla public licen",)),
    ("epl", ("eclipse public licen",)),
    ("apache", ("apache license, version 2", "apache license version 2", "licensed to the apache software foundation")),
    ("psf", ("psf licen", "python software foundation licen", "licensed to psf under a contributor agreement")),
    ("bsd", ("redistribution and use in source and binary forms", "bsd-style licen", "bsd style licen")),
    ("isc", ("permission to use, copy, modify, and distribute this software for any purpose",)),
    ("isc", ("permission to use, copy, modify, and/or distribute this software for any purpose",)),
    ("mit", ("permission is hereby granted, free of charge, to any person obtaining a copy", "mit licen")),
    ("unlicense", ("this is free and unencumbered software", "released into the public domain")),
    ("proprietary", ("proprietary and confidential", "confidential and proprietary")),
)
HINTS = ("licen", "permission", "redistribution", "public domain", "proprietary")  # each phrase contains one
_COMMENT = re.compile(r"^[ \t]*(?:#+|//+|\*+|--|;+|%+|\"\"\"|/\*+)?[ \t]*", re.MULTILINE)


@dataclass(frozen=True)
class Licence:
    """Keep source files under free licences; writes "licence" into each document's meta where one is found.

    Llama 1 kept projects under the Apache, BSD and MIT licences (arXiv 2302.13971, section 2.1). The row's own column
    (license, licenses) counts before the file's text. Costs about 10 microseconds a document.
    """

    name: ClassVar[str] = "licence"

    keep: tuple[str, ...] = ("apache", "bsd", "mit", "isc", "psf", "unlicense", "cc0", "0bsd", "zlib", "python")
    """Licences to keep: how their names begin, in lower case ("bsd" covers BSD-3-Clause)."""
    keep_unknown: bool = True
    """Whether to keep files that name no licence, since it often stands in another file of the project."""

    def __post_init__(self) -> None:
        for name in self.keep:
            if not name or name != name.strip().lower():
                raise ConfigError(
                    f"licence.keep has {name!r}; give the beginning of a name in lower case, as it is compared: "
                    f"{name.strip().lower() or 'mit'!r}"
                )

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
    low = head.lower()
    if not any(hint in low for hint in HINTS):
        return []
    if spdx := SPDX.search(head):
        return [spdx[1].lower()]
    plain = " ".join(_COMMENT.sub("", low).split())
    return next(([name] for name, phrases in PHRASES if any(phrase in plain for phrase in phrases)), [])
