"""Rejection sampling fine-tuning: the recipe behind `arriero rejection`.

Llama 2 (arXiv 2307.09288, section 3.2.3) and Llama 3 (2407.21783, 4.2.2).

A round samples K answers to every prompt with the newest model, scores them, chooses the best of each prompt over this
and all earlier rounds, and fine-tunes on them by the recipe of supervised fine-tuning, from the model that the run
began with.
Choosing among the last round alone forgot abilities at Meta; `last_round_only` shows it.

    out/config.toml, data.json              as of any run
    out/held_out-0.jsonl                    answers of the first model to held-out prompts
    out/round-1/answers/00000.jsonl ...     answers with their rewards, some hundred a file
    out/round-1/chosen.jsonl                rows that are learned
    out/round-1/sft/                        the fine-tuning run, with its adapter or model
    out/round-1/held_out.jsonl, round.json  how well that does, and what the round came to
    out/metrics.jsonl, report.html          rewards and samples by round, where prompts are held out
    out/adapter (or out/model)              a link to the last round's

Each file appears whole or not at all, and what it says is a function of the settings and of what stood before; so a run
that was killed anywhere goes on with `--resume` to the same result. The inference engine samples, in this process.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from arriero.checkpoint.load import load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.data.prompts import Prompt, Prompts, read_split
from arriero.distributed.mesh import Mesh
from arriero.errors import ConfigError, DataError
from arriero.io.files import write_json, write_jsonl
from arriero.rewards.base import Scorer
from arriero.rewards.open import open_scorer
from arriero.show.terminal import notes, output
from arriero.train import sft
from arriero.train.best_of import Choice, Sampled, choose, statistics
from arriero.train.claim import check_named, claimed, refuse_changed
from arriero.train.loop import Outcome
from arriero.train.recipe import alone, record
from arriero.train.rejection_answers import RoundAnswers, read_answers
from arriero.train.rejection_config import RejectionConfig
from arriero.train.rejection_report import table, write_rounds


def main(config: RejectionConfig) -> Outcome | None:
    """All rounds. Returns how a round's training was interrupted, or None where all were done.

    Raises a `UserError` before anything is sampled for whatever cannot be asked, scored or trained on.
    """
    check_named(config, "rejection")
    if config.reward.startswith("llama2:"):
        raise ConfigError(
            "reward llama2 is whitened over a batch, so answers of different batches cannot be compared; write "
            "llama2-plain"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("rejection samples in one process; start it without torchrun")
    with claimed(config, "rejection", alone()) as recorded, open_scorer(config.reward, config.reward_seconds) as scorer:
        run = build(config, notes(), scorer=scorer)
        refuse_changed(recorded, run.fingerprints(), f"run {config.out}")
        record(config, "rejection", run)  # type: ignore[arg-type]  # it has all that is recorded
        run.console.print(run.summary(), markup=False, soft_wrap=True)
        return run.go()


@dataclass(frozen=True)
class RejectionRun:
    """Everything that the rounds are made of."""

    config: RejectionConfig
    prompts: Prompts
    held_out: Prompts | None
    scorer: Scorer
    console: Console

    def summary(self) -> str:
        """What is about to happen."""
        c = self.config
        asked = 0 if self.held_out is None else len(self.held_out)
        best = "this round's" if c.last_round_only else "all rounds'"
        least = "whatever their reward" if c.every_prompt else f"above {c.above:g}"
        return (
            f"{c.model}: {c.rounds} rounds of {c.answers} answers to {len(self.prompts):,} prompts at temperatures "
            f"{', '.join(f'{t:g}' for t in c.temperatures)}, scored by {c.reward}\n"
            f"the best {c.keep} of {best} answers {least} are learned ({c.method}); {asked:,} prompts held "
            f"out -> {c.out}"
        )

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what is asked."""
        both = {"the prompts": self.prompts, "the held-out prompts": self.held_out}
        return {name: prompts.fingerprint for name, prompts in both.items() if prompts is not None}

    def data_statistics(self) -> dict[str, Any]:
        """What is asked, and how much."""
        held_out = 0 if self.held_out is None else len(self.held_out)
        return {"train": self.config.data.train, "prompts": len(self.prompts), "held_out_prompts": held_out}

    def go(self) -> Outcome | None:
        """Every round that is not done yet."""
        out = Path(self.config.out)
        if self.held_out is not None and not (out / "held_out-0.jsonl").exists():
            self._answers.measure(out / "held_out-0.jsonl", *self.config.model_after(0))
        for number in range(1, self.config.rounds + 1):
            if (out / f"round-{number}" / "round.json").exists():
                continue
            if (interrupted := self._round(number)) is not None:
                return interrupted
            if self.held_out is not None:
                write_rounds(self.config, number)
        kind = "adapter" if self.config.method == "lora" else "model"
        _link(out / kind, Path(f"round-{self.config.rounds}") / "sft" / kind)
        output().print(table(self.config, self.held_out is not None))
        report = f"\nreport {out / 'report.html'}" if self.held_out is not None else ""
        self.console.print(f"saved {out / kind}{report}", markup=False, soft_wrap=True)
        return None

    def _round(self, number: int) -> Outcome | None:
        """Sample, choose, train, measure. Returns how the training was interrupted, if it was."""
        config, directory = self.config, Path(self.config.out) / f"round-{number}"
        answers = self._answers.sampled(number, directory / "answers", *self.config.model_after(number - 1))
        pool = list(answers)
        for earlier in range(1, number):
            if not config.last_round_only:
                pool += read_answers(directory.parent / f"round-{earlier}" / "answers")
        choice = choose(
            pool, keep=config.keep, above=-math.inf if config.every_prompt else config.above,
            max_length_ratio=config.max_length_ratio, max_same=config.max_same, seed=config.loop.seed,
        )  # fmt: skip
        if not choice.chosen:
            raise DataError(
                f"round {number}: none of {len(pool):,} answers is worth learning ({_why(choice)}); take easier "
                "prompts, more answers, or a lower `above`, or every_prompt"
            )
        write_jsonl(directory / "chosen.jsonl", [self._row(answer) for answer in choice.chosen])
        outcome = sft.main(config.training(number))
        if outcome.interrupted is not None:
            return outcome
        if self.held_out is not None:
            self._answers.measure(directory / "held_out.jsonl", *self.config.model_after(number))
        write_json(directory / "round.json", {"round": number, **statistics(answers, choice)})
        return None

    @property
    def _answers(self) -> RoundAnswers:
        return RoundAnswers(self.config, self.prompts, self.held_out, self.scorer, self.console)

    def _row(self, answer: Sampled) -> dict[str, Any]:
        """What is learned of an answer, with where it came from."""
        prompt: Prompt = self.prompts[answer.prompt]
        origin = {"reward": answer.value, "round": answer.round, "temperature": answer.temperature}
        return {"prompt": prompt.messages, "completion": answer.text, "meta": {"prompt": prompt.where, **origin}}


def build(
    config: RejectionConfig, console: Console, mesh: Mesh | None = None, *, scorer: Scorer | None = None
) -> RejectionRun:
    """Read and check what is asked. mesh: nothing to a recipe of one process. scorer: None opens the settings' own."""
    tokenizer = load_tokenizer_at(
        resolve(config.model), adapter=config.adapter or None, chat_template=config.chat_template
    )
    data = config.data
    prompts, held_out = read_split(
        data.train, data.validation, tokenizer, max_length=data.max_prompt, max_truncated=data.max_truncated,
        console=console,
    )  # fmt: skip
    scorer = scorer or open_scorer(config.reward, config.reward_seconds)
    for prompt in [*prompts, *(held_out or ())]:
        scorer.check(prompt.fields, prompt.where)
    return RejectionRun(config, prompts, held_out, scorer, console)


def _link(path: Path, target: Path) -> None:
    """Let `path` lead to `target`, relative to its directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.symlink_to(target)
    os.replace(temporary, path)


def _why(choice: Choice) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in choice.left_out.items())
