"""Settings of evaluations. No torch here: the command line reads this module to print its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arriero.errors import check
from arriero.io.paths import PathText
from arriero.settings import settle


@dataclass(frozen=True)
class EvalConfig:
    """One model (or two, side by side) measured on one file."""

    model: PathText = ""
    """What is measured: a directory, a .gguf file, a Hub id, or a built-in name."""
    data: PathText = ""
    """A .txt file, rows with "text", or rows with answers (the layouts that `arriero sft` reads)."""
    adapter: PathText = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    compare_with: PathText = ""
    """A second model, measured first on the same rows without the adapter: the "before" of the table."""
    chat_template: PathText = ""
    """For answers: a template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file, of
    both models; empty takes each one's own, of an adapter the one that it was trained with."""
    out: PathText = ""
    """Directory for results.json and samples.jsonl; empty writes nothing."""
    task: Literal["auto", "perplexity", "answers"] = "auto"
    """Perplexity of texts, or generated answers against references; auto looks at the first row."""
    rows: int = 0
    """Rows measured, from the top of the file; 0 for all."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and matmuls; softmax and sums are fp32 in both."""
    quantize: Literal["", "int8", "int4"] = ""
    """Measure `model` with its matrices rounded as `arriero chat --quantize` rounds them; `compare_with` as it is."""
    window: int = 2048
    """Tokens that the model sees at once on long texts; no more than its context is used."""
    context: int = 512
    """Fewest tokens before a scored one in every window but the first; 1 makes windows disjoint. At most half of the
    model's context where that is shorter than the window."""
    max_new_tokens: int = 128
    """Longest generated answer, in tokens."""
    batch: int = 16
    """Answers generated at once."""
    resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Decides the bootstrap's resamples; decoding is greedy and needs none."""
    examples: int = 5
    """Rows shown in full on the screen."""

    def __post_init__(self) -> None:
        settle(self)
        for name in ("window", "context", "max_new_tokens", "batch"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(self.window >= 2, f"window is {self.window}; it must be at least 2 tokens")
        check(
            self.context < self.window,
            f"context {self.context} is not below window {self.window}: no token would be left to score in a window; "
            "lower context or raise window",
        )
        check(self.resamples >= 100, f"resamples is {self.resamples}; an interval needs at least 100")
        for name in ("rows", "examples", "seed"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")


@dataclass(frozen=True)
class NeedleConfig:
    """One model (or two, side by side) asked for facts hidden in long texts."""

    model: PathText = ""
    """What is measured: a directory, a .gguf file, a Hub id, or a built-in name."""
    adapter: PathText = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    compare_with: PathText = ""
    """A second model, measured first on the same texts without the adapter: the "before" of the tables."""
    out: PathText = ""
    """Directory for needle.png, needle.json, results.json and samples.jsonl; empty writes nothing."""
    haystack: PathText = ""
    """The prose: a file, directory or data set, as `arriero curate` takes them; empty takes Python's help topics."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Tokens of the texts, question and answer included; they may go past the model's context."""
    depths: int = 5
    """Places of the needle, from the beginning of the prose to its end."""
    trials: int = 3
    """Texts at each length and depth: other prose, another key."""
    together: bool = False
    """Hide a needle at every depth of one text and ask for all (multi-needle), and not one in a text of its own."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and matmuls; softmax and sums are fp32 in both."""
    quantize: Literal["", "int8", "int4"] = ""
    """Measure `model` with its matrices rounded as `arriero chat --quantize` rounds them; `compare_with` as it is."""
    resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Decides prose, places and keys."""

    def __post_init__(self) -> None:
        settle(self)
        check(len(self.lengths) > 0, "lengths is empty; give at least one, such as 2048")
        check(min(self.lengths) >= 64, f"lengths has {min(self.lengths)}; a text needs at least 64 tokens")
        check(1 <= self.depths <= 10, f"depths is {self.depths}; it must be from 1 to 10")
        check(self.trials >= 1, f"trials is {self.trials}; it must be at least 1")
        check(self.resamples >= 100, f"resamples is {self.resamples}; an interval needs at least 100")
        check(self.seed >= 0, f"seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class PassConfig:
    """One model (or two, side by side) answering prompts whose answers are checked: rewards and pass@k."""

    model: PathText = ""
    """What is measured: a directory, a .gguf file, a Hub id, or a built-in name."""
    data: PathText = ""
    """Rows with `prompt` (a text, or messages) and what the reward needs, such as `answer`."""
    reward: str = "numeric"
    """What scores the answers: exact, numeric, math, regex, json-schema, unit-tests, python:PATH:FUNCTION and others
    (docs/rewards.md)."""
    reward_seconds: float = 0.0
    """Seconds that scoring one answer may take; 0 takes the reward's own limit."""
    adapter: PathText = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    compare_with: PathText = ""
    """A second model, measured first on the same rows without the adapter: the "before" of the table."""
    chat_template: PathText = ""
    """A template's name or a .jinja file, of both models; empty takes each one's own."""
    raw: bool = False
    """Give the prompts as plain text to continue, without the chat template."""
    out: PathText = ""
    """Directory for results.json and samples.jsonl; empty writes nothing."""
    rows: int = 0
    """Rows measured, from the top of the file; 0 for all."""
    answers: int = 8
    """Sampled answers to each prompt, beside a greedy one: k of pass@k."""
    temperature: float = 1.0
    """Of sampling, over the whole vocabulary."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; one that is cut is wrong."""
    max_prompt: int = 1024
    """Longest prompt, in tokens."""
    at_once: int = 64
    """Answers that are decoded at a time."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and matmuls; softmax and sums are fp32 in both."""
    quantize: Literal["", "int8", "int4"] = ""
    """Measure `model` with its matrices rounded as `arriero chat --quantize` rounds them; `compare_with` as it is."""
    resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Decides the sampled answers and the bootstrap's resamples."""
    examples: int = 5
    """Rows shown in full on the screen."""

    def __post_init__(self) -> None:
        settle(self)
        for name in ("answers", "max_new_tokens", "max_prompt", "at_once"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0 (one is greedy anyway)")
        check(self.resamples >= 100, f"resamples is {self.resamples}; an interval needs at least 100")
        for name in ("rows", "examples", "seed"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")


@dataclass(frozen=True)
class ObedienceConfig:
    """One model (or two, side by side) held to an instruction of the first turn through a dialogue."""

    model: PathText = ""
    """What is measured: a directory, a .gguf file, a Hub id, or a built-in name."""
    data: PathText = ""
    """Dialogues (`messages`): the user's turns are asked in order, each after the model's own answers."""
    adapter: PathText = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    compare_with: PathText = ""
    """A second model, measured first on the same dialogues without the adapter: the "before" of the table."""
    chat_template: PathText = ""
    """A template's name or a .jinja file, of both models; empty takes each one's own."""
    out: PathText = ""
    """Directory for results.json and samples.jsonl; empty writes nothing."""
    rows: int = 0
    """Dialogues measured, from the top of the file; 0 for all."""
    most: int = 1
    """Instructions of different kinds that a dialogue gets, at most; an answer has to obey all of them."""
    every_turn: bool = False
    """Join the instruction to every turn, not to the first alone: what could be reached if nothing were forgotten."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most probable token."""
    max_new_tokens: int = 128
    """Longest answer, in tokens; one that is cut is judged as it stands."""
    at_once: int = 64
    """Answers that are decoded at a time."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and matmuls; softmax and sums are fp32 in both."""
    quantize: Literal["", "int8", "int4"] = ""
    """Measure `model` with its matrices rounded as `arriero chat --quantize` rounds them; `compare_with` as it is."""
    resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Decides the instructions, the sampled answers and the bootstrap's resamples."""
    examples: int = 3
    """Dialogues shown in full on the screen."""

    def __post_init__(self) -> None:
        settle(self)
        for name in ("most", "max_new_tokens", "at_once"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(self.temperature >= 0, f"temperature is {self.temperature}; it must be at least 0 (greedy)")
        check(self.resamples >= 100, f"resamples is {self.resamples}; an interval needs at least 100")
        for name in ("rows", "examples", "seed"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")
