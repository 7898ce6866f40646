"""Settings of `arriero curate`: which documents, which steps in which order, and the settings of each step.

A step is listed in `steps` and configured in the table of its name: steps = ["gopher-quality"], [gopher_quality]
min_words = 30. A step may be listed once. Documents of `code_sources` are code: rules for prose skip them, and rules
for code apply to them only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from arriero.curate.minhash import MinHashConfig
from arriero.curate.rules import (
    C4Rules,
    CodeRules,
    DirtyWords,
    FineWebRules,
    GopherQuality,
    GopherRepetition,
    NgramCoverage,
    TokenOutlier,
)
from arriero.curate.steps.corpus import CorpusOutlier, ExactDedup, LineDedup, NearDedup, UrlDedup
from arriero.curate.steps.decontaminate import Decontaminate
from arriero.curate.steps.language import Language
from arriero.curate.steps.licence import Licence
from arriero.curate.steps.normalise import Normalise
from arriero.curate.steps.quality import Quality
from arriero.curate.steps.scrub import Scrub
from arriero.curate.web import Extractor
from arriero.errors import ConfigError, did_you_mean
from arriero.io.paths import PathText
from arriero.settings import settle

Kind = Literal["prose", "code"]
BOTH: tuple[Kind, ...] = ("prose", "code")

KINDS: dict[str, tuple[Kind, ...]] = {
    "normalise": BOTH,
    "language": ("prose",),
    "gopher-repetition": ("prose",),
    "gopher-quality": ("prose",),
    "c4": ("prose",),
    "fineweb": ("prose",),
    "ngram-coverage": ("prose",),
    "dirty-words": ("prose",),
    "token-outlier": ("prose",),
    "licence": ("code",),
    "code": ("code",),
    "url-dedup": BOTH,
    "exact-dedup": BOTH,
    "near-dedup": BOTH,
    "line-dedup": ("prose",),
    "scrub": BOTH,
    "quality": ("prose",),
    "decontaminate": BOTH,
}
"""The steps, and which documents each judges."""

GENERAL = (
    "normalise", "language", "gopher-repetition", "licence", "code", "exact-dedup", "near-dedup", "scrub",
)  # fmt: skip


@dataclass(frozen=True)
class CurateConfig:
    """Raw documents to clean documents: sources, steps in order, and each step's numbers."""

    sources: tuple[PathText, ...] = ()
    """Files, directories, "stdlib" (Python's standard library), or Hub data set ids; in this order."""
    out: PathText = ""
    """Directory for the shards, manifest.json and report.html."""
    steps: tuple[str, ...] = GENERAL
    """Names of the steps, in the order in which they are taken; each is tuned in the table of its name."""
    text_key: str = "text"
    """Column of the text in JSONL, Parquet and other rows."""
    html: Extractor = "resiliparse"
    """Who finds the main text of HTML: resiliparse is some twenty times faster, trafilatura keeps less that is not
    text."""
    code_sources: tuple[str, ...] = ("code",)
    """Documents whose source is one of these are source code, as those of .py files and the like are anyway."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a row or file that cannot be read: stop and name it, or count it and go on."""
    format: Literal["parquet", "jsonl.zst"] = "parquet"
    """Format of the shards."""
    shard_mb: float = 256.0
    """Text in a shard, megabytes: it ends with the first piece of work (part_mb) that reaches this."""
    part_mb: float = 4.0
    """Text in one piece of work, megabytes: what one worker takes on at a time, and repeats at most after a crash.
    More, such as 64, makes fewer files of a large corpus."""
    examples: int = 4
    """Random examples in the report of what each step kept, dropped and changed."""
    seed: int = 0
    """Decides which examples are shown; nothing else here is random."""
    workers: int = 0
    """Processes; 0 means one per core. The result is the same for any number."""
    ray: str = ""
    """Address of a Ray cluster that shares this file system, or "local"; empty means a process pool."""

    normalise: Normalise = field(default_factory=Normalise)
    language: Language = field(default_factory=Language)
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    c4: C4Rules = field(default_factory=C4Rules)
    fineweb: FineWebRules = field(default_factory=FineWebRules)
    ngram_coverage: NgramCoverage = field(default_factory=NgramCoverage)
    dirty_words: DirtyWords = field(default_factory=DirtyWords)
    token_outlier: TokenOutlier = field(default_factory=TokenOutlier)
    licence: Licence = field(default_factory=Licence)
    code: CodeRules = field(default_factory=CodeRules)
    near_dedup: MinHashConfig = field(default_factory=MinHashConfig)
    line_dedup: LineDedup = field(default_factory=LineDedup)
    scrub: Scrub = field(default_factory=Scrub)
    quality: Quality = field(default_factory=Quality)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)

    def __post_init__(self) -> None:
        settle(self)
        for name in self.steps:
            if name not in KINDS:
                raise ConfigError(
                    f"steps has {name!r}, which is no step{did_you_mean(name, KINDS)} (known: {', '.join(KINDS)})"
                )
            if self.steps.count(name) > 1:
                raise ConfigError(f"steps has {name!r} more than once; keep one of them")
        for name, least in (("shard_mb", 0.001), ("part_mb", 0.001), ("examples", 0), ("workers", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a number of at least {least}")
        for name, setting in (("dirty-words", "words"), ("quality", "model"), ("decontaminate", "against")):
            table = name.replace("-", "_")
            if name in self.steps and not getattr(getattr(self, table), setting):
                raise ConfigError(f'steps has "{name}", but {table}.{setting} is empty; give it, or take the step out')

    def step(self, name: str) -> Any:
        """A step with its settings."""
        made = {
            "exact-dedup": lambda: ExactDedup(),
            "url-dedup": lambda: UrlDedup(),
            "near-dedup": lambda: NearDedup(self.near_dedup),
            "token-outlier": lambda: CorpusOutlier(self.token_outlier),
        }
        return made[name]() if name in made else getattr(self, name.replace("-", "_"))

    def deciding(self) -> dict[str, Any]:
        """The settings that the output's bytes depend on: all but directory and executor, and without unused steps'
        tables."""
        from arriero.settings import to_dict

        values = to_dict(self)
        for name in ("out", "workers", "ray"):
            del values[name]
        for name in KINDS:
            if name not in self.steps:
                values.pop(name.replace("-", "_"), None)
        return values


def is_corpus_step(step: Any) -> bool:
    """Whether only the whole corpus can decide."""
    return hasattr(step, "collect")


def stages(config: CurateConfig) -> list[tuple[str | None, Sequence[str], str | None]]:
    """The steps cut at corpus steps: (the one to apply first, steps after it, the one to collect for at the end)."""
    out: list[tuple[str | None, Sequence[str], str | None]] = []
    first: str | None = None
    since: list[str] = []
    for name in config.steps:
        if is_corpus_step(config.step(name)):
            out.append((first, tuple(since), name))
            first, since = name, []
        else:
            since.append(name)
    return [*out, (first, tuple(since), None)]
