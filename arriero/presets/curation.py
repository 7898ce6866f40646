"""Raw documents to a clean corpus. The rules need numpy, so they are imported when a preset is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arriero.curate.config import CurateConfig


def curate_web() -> CurateConfig:
    """Web pages as FineWeb keeps them (arXiv 2406.17557), with Llama 3's line and URL deduplication."""
    from arriero.curate.config import CurateConfig
    from arriero.curate.rules import C4Rules, FineWebRules

    return CurateConfig(
        on_error="skip",
        steps=(
            "normalise", "url-dedup", "exact-dedup", "language", "gopher-repetition", "gopher-quality", "c4", "fineweb",
            "ngram-coverage", "licence", "code", "line-dedup", "near-dedup", "scrub",
        ),
        # the thresholds of datatrove's examples/fineweb.py: all of C4's rules but that lines must end in punctuation
        c4=C4Rules(min_words=3, min_sentences=5, line_ends=()),
        fineweb=FineWebRules(max_dup_line_char_frac=0.01),
    )  # fmt: skip


def curate_prose() -> CurateConfig:
    """Books, speeches, manuals: texts that somebody edited. Duplicates, other languages and repetition go."""
    from arriero.curate.config import CurateConfig

    return CurateConfig(
        steps=("normalise", "language", "gopher-repetition", "licence", "code", "exact-dedup", "near-dedup", "scrub"),
    )


def curate_code() -> CurateConfig:
    """Source code as Llama 1 filters it (arXiv 2302.13971, 2.1): licence, line length, alphanumeric share."""
    from arriero.curate.config import CurateConfig

    return CurateConfig(
        steps=("normalise", "licence", "code", "exact-dedup", "near-dedup", "scrub"),
    )
