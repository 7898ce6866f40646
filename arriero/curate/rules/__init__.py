"""Published rules for what a document must be, as dataclasses: their fields are their thresholds.

A rule judges a whole batch that has been analysed once: `judge(analysis)` gives for each document None, to keep it,
or a short reason to drop it. One that changes texts has `edit(analysis)` instead, which gives (new text, None or the
reason). docs/curation-rules.md lists them with their sources.
"""

from arriero.curate.rules.c4 import C4Rules
from arriero.curate.rules.fineweb import FineWebRules
from arriero.curate.rules.gopher import GopherQuality, GopherRepetition
from arriero.curate.rules.llama import CodeRules, DirtyWords, NgramCoverage, TokenOutlier

__all__ = [
    "C4Rules",
    "CodeRules",
    "DirtyWords",
    "FineWebRules",
    "GopherQuality",
    "GopherRepetition",
    "NgramCoverage",
    "TokenOutlier",
]
