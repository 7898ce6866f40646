"""A run that goes on from a model and learns from rows of a file: what such recipes say and record of themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.train.loop import Trainer
from arriero.train.recipe import few_steps_note, warmup_note
from arriero.train.tuned import Tuned


@dataclass(frozen=True)
class RowsRun(ABC):
    """Everything a run is made of, ready for step 1; each recipe's own has its rows and their loader."""

    config: Any  # of a recipe: a TuneConfig with `data`
    tuned: Tuned
    training: Any
    validation: Any  # None: nothing is held out
    loader: Any
    trainer: Trainer

    @property
    def total_tokens(self) -> int:
        """Tokens through the model over the whole run, padding included."""
        return self.trainer.total_steps * self.config.loop.batch_rows * self.config.data.seq_len

    @property
    def n_held_out(self) -> int:
        """Rows that are validated on."""
        return 0 if self.validation is None else len(self.validation)

    @abstractmethod
    def counted(self) -> str:
        """How much there is to learn from, for the summary."""

    def summary(self) -> str:
        """What is about to happen, in a few lines."""
        config, steps = self.config, self.trainer.total_steps
        return (
            f"{self.tuned.summary()}\n{self.counted()}\n"
            f"{steps:,} steps of {config.loop.batch_rows} rows -> {config.out}"
            + warmup_note(config.optim, steps)
            + few_steps_note(config.loop, steps)
        )

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the rows as tokens, training and validation."""
        both = {"training data": self.training, "validation data": self.validation}
        found = {f"the {name}": rows.fingerprint for name, rows in both.items() if rows is not None}
        return found | self.tuned.fingerprints()

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """Counts and lengths of the rows."""

    def data_statistics(self) -> dict[str, Any]:
        """What is learned from, and how much."""
        return {
            "train": self.config.data.train,
            "tokenizer_fingerprint": self.tuned.base.tokenizer.fingerprint,
            **self.statistics(),
        }

    def export(self) -> Path:
        """Write the trained adapter (PEFT's layout) or model (Hugging Face's); returns its directory."""
        return self.tuned.export()
