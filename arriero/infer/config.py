"""What generation is told. No torch here: the command line reads this module to print its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from arriero.errors import check


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; the filters apply in the order of the fields."""

    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens seen already, and multiplies the negative ones; 1 does nothing."""
    temperature: float = 0.0
    """Divides the logits: below 1 sharper, above 1 flatter; 0 always takes the most probable token."""
    top_k: int = 0
    """Choose among this many most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the fewest most probable tokens that together have this probability; 1 means all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one's probability; 0 drops none."""
    seed: int | None = None
    """The same seed gives the same text; none draws a new one each time."""

    def __post_init__(self) -> None:
        check(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        check(self.temperature >= 0, f"temperature is {self.temperature}; it must be at least 0 (0: most probable)")
        check(self.top_k >= 0, f"top_k is {self.top_k}; it must be at least 0 (0: all tokens)")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it is a probability, in (0, 1]")
        check(0 <= self.min_p < 1, f"min_p is {self.min_p}; it is a share, in [0, 1)")
        check(self.seed is None or self.seed >= 0, f"seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class GenerateConfig:
    """One prompt, answered once."""

    model: str = ""
    """A directory, a .gguf file, a Hub id, or a built-in name."""
    prompt: str = ""
    """What to answer; empty reads standard input to its end."""
    adapter: str = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    system: str = ""
    """System prompt; empty leaves it to the chat template."""
    raw: bool = False
    """Continue the prompt as plain text, without the chat template."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and cache; bf16 is read twice as fast."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        check(
            not (self.raw and self.system),
            "system is given with raw: a plain continuation has no system prompt; drop one",
        )


@dataclass(frozen=True)
class ChatConfig:
    """A conversation in the terminal."""

    model: str = ""
    """A directory, a .gguf file, a Hub id, or a built-in name."""
    adapter: str = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    system: str = ""
    """System prompt; empty leaves it to the chat template."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    context: int = 0
    """Tokens of conversation that the model sees; older turns are dropped. 0 means the model's own, at most 8192."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and cache; bf16 is read twice as fast."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.9))

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        check(self.context >= 0, f"context is {self.context}; it must be at least 0 (0: the model's own)")
