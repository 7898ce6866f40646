"""The user's own classifier as a step (curate/classifier.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from arriero.curate import classifier
from arriero.curate.batch import Batch, Result, with_meta
from arriero.errors import ConfigError
from arriero.io.paths import PathText


@dataclass(frozen=True)
class Quality:
    """Drop what looks like random documents rather than good ones; writes "quality" into each document's meta."""

    name: ClassVar[str] = "quality"

    model: PathText = ""
    """File that `arriero curate classifier` wrote."""
    min_score: float = 0.5
    """Least probability of being good, where good and random documents are equally frequent."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ConfigError(f"quality.min_score is {self.min_score}; it must be from 0 to 1")

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files whose content decides what the step does."""
        return (Path(self.model),)

    def run(self, batch: Batch) -> Result:
        """Each document with its quality, dropped below the threshold."""
        scores = classifier.load(self.model).score(batch.analysis).tolist()
        return [
            (
                with_meta(document, quality=round(score, 4)),
                f"quality {score:.2f} < {self.min_score:g}" if not score >= self.min_score else None,
            )
            for document, score in zip(batch.documents, scores, strict=True)
        ]
