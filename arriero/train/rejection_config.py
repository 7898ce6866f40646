"""Settings of rejection sampling. No torch here: the command line reads this module to print its help."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from arriero.errors import check
from arriero.io.paths import PathText
from arriero.train.config import DataConfig, LoopConfig, OptimConfig, SftConfig, TuneConfig


@dataclass(frozen=True)
class RejectionDataConfig(DataConfig):
    """What is asked, and how the chosen answers are laid into rows."""

    train: PathText = ""
    """Prompts: a file (JSONL, JSON, CSV, Parquet) with a column `prompt` (text or messages), a directory of them, or a
    Hub data set id. All other columns are for the reward."""
    validation: PathText = "0.1"
    """Held-out prompts: a file, or the share of what is asked; 0 measures nothing."""
    max_prompt: int = 1024
    """Longest prompt, in tokens; max_truncated bounds the share that is left out."""
    validation_prompts: int = 500
    """Held-out prompts that are answered after each round, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_prompt >= 1, f"max_prompt is {self.max_prompt}; it must be at least 1")
        check(self.validation_prompts >= 1, f"validation_prompts is {self.validation_prompts}; it must be at least 1")


@dataclass(frozen=True)
class RejectionConfig(TuneConfig):
    """Rejection sampling: of K answers to each prompt the best are learned by supervised fine-tuning, in rounds."""

    out: PathText = "out/rejection"
    """Run directory: a directory for each round, with all answers, the chosen rows, and the fine-tuning run."""
    reward: str = "exact"
    """What answers are scored by: exact, numeric, math, regex, json-schema, unit-tests, with :FIELD for another field
    of the row, python:PATH:FUNCTION, and others (arriero ls rewards)."""
    reward_seconds: float = 0.0
    """Seconds that scoring one answer may take; 0 takes the reward's own limit."""
    rounds: int = 2
    """Rounds of sampling, choosing and training. A run that has ended goes on with more of them by --resume."""
    answers: int = 8
    """Answers to each prompt in a round (K), spread evenly over the temperatures."""
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.3)
    """Temperatures of sampling. What each of them gives is recorded every round: the best one rises as a model is
    trained (Llama 2, section 3.2.3: 1.2 to 1.3 with 10 to 100 answers)."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; one that is cut there is never chosen."""
    keep: int = 2
    """Best answers of each prompt that are learned, if they differ."""
    above: float = 0.0
    """Answers of at most this reward are not learned."""
    every_prompt: bool = False
    """Learn the best answer to each prompt whatever its reward, as Llama 2 did: for rewards without a zero."""
    last_round_only: bool = False
    """Choose among the answers of this round alone, not of all so far: it forgets (Llama 2, section 3.2.3)."""
    from_last: bool = False
    """Train each round on from the last one's adapter, not from the model that the run began with. Method lora only."""
    max_length_ratio: float = 4.0
    """Longest answer that may be chosen, over the median length of the prompt's answers, against rewards that grow with
    length; answers of up to 32 tokens always may. 0: any."""
    max_same: float = 0.05
    """Largest share of the chosen rows with one and the same text, of texts of 16 characters and more; what is above it
    is left out. 1: any."""
    validation_answers: int = 4
    """Sampled answers to each held-out prompt, at temperature 1, beside the greedy one; their mean is pass@1."""
    at_once: int = 64
    """Answers that are decoded at a time."""
    data: RejectionDataConfig = field(default_factory=RejectionDataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=2, batch_rows=1))
    """Chosen answers are few and short: small steps, so that there are some."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "answers", "max_new_tokens", "keep", "validation_answers", "at_once"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(
            bool(self.temperatures) and all(0 < t < math.inf for t in self.temperatures),
            f"temperatures are {self.temperatures}; give one or more above 0 (greedy answers are all the same)",
        )
        check(
            len(self.temperatures) <= self.answers,
            f"temperatures are {len(self.temperatures)} and answers {self.answers}; each temperature needs an answer",
        )
        check(
            self.max_length_ratio == 0 or self.max_length_ratio >= 1,
            f"max_length_ratio is {self.max_length_ratio}; it must be at least 1, or 0 for none",
        )
        check(0 < self.max_same <= 1, f"max_same is {self.max_same}; it is a share, in (0, 1]")
        check(
            not self.from_last or self.method == "lora",
            "from_last is on and method full; every round of full fine-tuning begins with the model: leave it off",
        )

    def model_after(self, rounds: int) -> tuple[str, str]:
        """The model, and its adapter or "", as it stands after so many rounds."""
        if rounds == 0:
            return self.model, self.adapter
        trained = Path(self.out) / f"round-{rounds}" / "sft"
        if self.method == "full":
            return str(trained / "model"), ""
        return self.model, str(trained / "adapter")

    def training(self, number: int) -> SftConfig:
        """The fine-tuning of a round; it goes on where it was begun."""
        out, data = Path(self.out) / f"round-{number}", self.data
        adapter = self.model_after(number - 1)[1] if self.from_last else self.adapter
        return SftConfig(
            model=self.model, out=str(out / "sft"), method=self.method, adapter=adapter, quantize=self.quantize,
            chat_template=self.chat_template, resume=(out / "sft" / "config.toml").exists(), samples=0,
            data=DataConfig(
                train=str(out / "chosen.jsonl"), validation="0", seq_len=data.seq_len, packing=data.packing,
                max_truncated=data.max_truncated, workers=data.workers,
            ),
            lora=self.lora, optim=self.optim, loop=self.loop, parallel=self.parallel,
        )  # fmt: skip
