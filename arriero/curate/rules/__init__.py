"""Published rules for the quality of documents, as dataclasses whose fields are the thresholds.

A rule judges a whole batch that has been analysed once: `judge(analysis)` returns for each document None, to keep it,
or a short reason to drop it. A rule that changes texts has `edit(analysis)` instead, which returns for each document
the new text and None or a reason. docs/curation-rules.md lists the rules with their sources.
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
