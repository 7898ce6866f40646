"""What recipes that learn from preferences have in common: their rows, and what a run says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from arriero.data.pack import random_order
from arriero.data.preference_formats import RATINGS
from arriero.data.preference_loader import PreferenceLoader
from arriero.data.preferences import PreferenceDataset, build_preference_splits, preference_stats
from arriero.distributed.mesh import Mesh
from arriero.errors import DataError
from arriero.io.records import source_files
from arriero.tokenizer.base import Tokenizer
from arriero.train.preference_config import DpoConfig, PreferenceDataConfig, RewardConfig
from arriero.train.rows_run import RowsRun

Splits = tuple[PreferenceDataset, PreferenceDataset | None]


@dataclass(frozen=True)
class PreferenceRun(RowsRun):
    """Everything a run is made of, ready for step 1."""

    config: DpoConfig | RewardConfig
    training: PreferenceDataset
    validation: PreferenceDataset | None
    loader: PreferenceLoader

    def counted(self) -> str:
        """How much there is to learn from, for the summary."""
        rows, tokens = self.loader.rows_in_epoch(0), self.config.data.seq_len
        return (
            f"{len(self.training):,} prompts with {int(self.training.counts.sum()):,} answers, {rows:,} rows of "
            f"{tokens:,} tokens; {self.n_held_out:,} prompts held out"
        )

    def statistics(self) -> dict[str, Any]:
        """Counts and lengths of the rows."""
        return {**preference_stats(self.training).to_dict(), "validation_rows": self.n_held_out}


def open_preferences(
    data: PreferenceDataConfig, tokenizer: Tokenizer, mesh: Mesh, console: Console, seed: int, *, pairs: bool = True
) -> Splits:
    """Training and validation rows as `data` says. pairs: only rows with answers of which one is better."""
    sources = [data.train, data.also] if data.also else [data.train]
    with mesh.one_before_others():  # who come later find the tokens in the cache
        training, validation = build_preference_splits(
            sources,
            data.validation,
            tokenizer,
            max_length=data.seq_len,
            max_truncated=data.max_truncated,
            workers=data.workers,
            console=console,
        )
    if data.also:
        training = _mixed(training, len(source_files(data.train)), data.also_share, seed)
    training = _chosen(training, data, pairs, console)
    return training, None if validation is None else _chosen(validation, data, pairs, console)


def _mixed(rows: PreferenceDataset, n_own: int, share: float, seed: int) -> PreferenceDataset:
    """All rows of the first `n_own` files, and of the others so many that they are `share` of all; or all there are."""
    own = rows.files < n_own
    others = np.flatnonzero(~own)
    n = min(len(others), round(own.sum() * share / (1 - share)))
    drawn = others[random_order(len(others), seed, 0, 3)[:n]]
    return rows.select(np.sort(np.concatenate([np.flatnonzero(own), drawn])))


def _chosen(rows: PreferenceDataset, data: PreferenceDataConfig, pairs: bool, console: Console) -> PreferenceDataset:
    """The rows that are learned from; those left out are counted."""
    if data.ratings:
        rated = np.isin(rows.ratings, [RATINGS.index(name) for name in data.ratings])
        rows = _kept(rows, rated, f"not rated {' or '.join(map(repr, data.ratings))}", console)
    if pairs:
        single = rows.counts < 2
        if single.any():
            i = int(np.argmax(single))
            raise DataError(
                f"{rows.where(i)}: it has one answer, and pairs are compared; take `arriero dpo --loss kto`, or leave "
                "such rows out"
            )
        rows = _kept(rows, rows.comparable, "all answers have one score", console)
    return rows


def _kept(rows: PreferenceDataset, wanted: np.ndarray, why: str, console: Console) -> PreferenceDataset:
    if not wanted.any():
        raise DataError(f"{rows.where(0)}: of it, and of all {len(rows):,} rows: {why}; nothing is left to learn from")
    if not wanted.all():
        console.print(f"left {(~wanted).sum():,} of {len(rows):,} rows out: {why}", markup=False)
    return rows.select(wanted)
