"""What a round of rejection sampling asks: scored answers to prompts, on disk as they come; and how good a model is.

Answers are written some hundred to a file, and a round that goes on asks for the files that are missing. Random numbers
are those of (seed, round, prompt, temperature), so it does not matter what was answered before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console

from arriero.checkpoint.load import best_device, load
from arriero.data.prompts import Prompts
from arriero.eval.verified import answered, to_score
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.io.files import write_jsonl
from arriero.model.linear import densify
from arriero.rewards.base import Scorer
from arriero.show.progress import progress
from arriero.train.best_of import Sampled
from arriero.train.recipe import DTYPES
from arriero.train.rejection_config import RejectionConfig
from arriero.train.rejection_report import read_rows

IN_A_FILE = 512  # answers, about: what a kill while sampling costs


@dataclass(frozen=True)
class RoundAnswers:
    """Asks the models of a run."""

    config: RejectionConfig
    prompts: Prompts
    held_out: Prompts | None
    scorer: Scorer
    console: Console

    def sampled(self, number: int, directory: Path, model: str, adapter: str) -> list[Sampled]:
        """The answers of a round by a model: those on disk, and the ones that are missing there."""
        step = max(1, IN_A_FILE // self.config.answers)
        parts = {directory / f"{i // step:05}.jsonl": range(i, min(i + step, len(self.prompts)))
                 for i in range(0, len(self.prompts), step)}  # fmt: skip
        missing = {path: those for path, those in parts.items() if not path.exists()}
        if missing:
            engine = self._engine(model, adapter)
            with progress(f"round {number}: sampling", sum(map(len, missing.values())), self.console) as bar:
                for path, those in missing.items():
                    write_jsonl(path, [vars(answer) for answer in self._answers(engine, number, those)])
                    bar.advance(len(those))
        return read_answers(directory)

    def _answers(self, engine: Engine, number: int, indices: Sequence[int]) -> list[Sampled]:
        """Sample and score answers to some prompts."""
        shares = _shares(self.config.answers, self.config.temperatures)
        asked = [(i, t, n) for i in indices for t, n in shares.items()]
        seed, longest = self.config.loop.seed, self.config.max_new_tokens
        requests = [
            Request(self.prompts[i].ids, longest, SamplingConfig(temperature=t, seed=_seed(seed, number, i, t)), n)
            for i, t, n in asked
        ]
        given = [
            (i, t, completion)
            for (i, t, _), those in zip(asked, engine.generate(requests), strict=True)
            for completion in those
        ]
        scores = self.scorer([to_score(self.prompts[i], c) for i, _, c in given])
        return [
            Sampled.of(i, c.text, len(c.ids), c.stopped, t, number, score)
            for (i, t, c), score in zip(given, scores, strict=True)
        ]

    def _engine(self, model: str, adapter: str) -> Engine:
        config = self.config
        opened, tokenizer = load(
            model, dtype=DTYPES[config.loop.precision], device=best_device(), adapter=adapter or None,
            chat_template=config.chat_template,
        )  # fmt: skip
        longest = max(p.longest for p in (self.prompts, self.held_out) if p is not None) + config.max_new_tokens
        context = min(longest, opened.config.max_context)
        step_tokens = max(512, config.at_once)
        return Engine(
            densify(opened).requires_grad_(False), tokenizer, max_running=config.at_once, step_tokens=step_tokens,
            context=context,
        )  # fmt: skip

    def measure(self, path: Path, model: str, adapter: str) -> None:
        """Answer the held-out prompts, greedily and by samples at temperature 1; a row for each prompt."""
        assert self.held_out is not None
        asked = self.held_out[: self.config.data.validation_prompts]
        judged = answered(
            self._engine(model, adapter), asked, self.scorer, self.config.validation_answers, temperature=1.0,
            max_new_tokens=self.config.max_new_tokens, seed=self.config.loop.seed, title="held-out prompts",
            console=self.console,
        )  # fmt: skip
        rows = []
        for prompt, (answers, scores) in zip(asked, judged, strict=True):
            values = [score.value for score in scores]
            rows.append(
                {"prompt": prompt.text, "answer": answers[0].text, "greedy": values[0], "sampled": values[1:],
                 "tokens": fmean(len(a.ids) for a in answers), "finished": fmean(a.stopped for a in answers)}
            )  # fmt: skip
        write_jsonl(path, rows)


def _shares(n: int, temperatures: Sequence[float]) -> dict[float, int]:
    """How many of n answers each temperature gets: the first ones one more where they do not divide."""
    each, more = divmod(n, len(temperatures))
    return {t: each + (i < more) for i, t in enumerate(temperatures)}


def _seed(seed: int, number: int, prompt: int, temperature: float) -> int:
    """Where the random numbers of one request begin: far from every other's."""
    digest = hashlib.sha256(f"{seed} {number} {prompt} {temperature!r}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_answers(directory: Path) -> list[Sampled]:
    """All answers of a round, in their order."""
    return [Sampled(**row) for path in sorted(directory.glob("*.jsonl")) for row in read_rows(path)]
