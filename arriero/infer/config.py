"""Settings of generation. No torch here: the command line reads this module to print its help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from arriero.errors import ConfigError, check
from arriero.io.paths import PathText
from arriero.settings import settle

ActivationBits = Literal[8, 15]
"""Bits of what goes into a product with int8 or int4 weights."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    In this order: logit bias, repetition penalty, presence and frequency penalties, temperature, top-k, top-p, min-p.
    """

    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt and answer, and multiplies the negative ones; 1 does nothing."""
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
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has already, from -2 to 2; the prompt does not count."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that the answer has it, from -2 to 2; the prompt does not count."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of single token ids, each from -100 to 100."""

    def __post_init__(self) -> None:
        check(self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        check(self.temperature >= 0, f"temperature is {self.temperature}; it must be at least 0 (0: most probable)")
        check(0 <= self.top_k < 2**31, f"top_k is {self.top_k}; it must be at least 0 (0: all tokens) and below 2**31")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it is a probability, in (0, 1]")
        check(0 <= self.min_p < 1, f"min_p is {self.min_p}; it is a share, in [0, 1)")
        check(
            self.seed is None or 0 <= self.seed < 2**64, f"seed is {self.seed}; it must be at least 0 and below 2**64"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(-2 <= value <= 2, f"{name} is {value}; it must be from -2 to 2 (0: none)")
        for token, bias in self.logit_bias.items():
            check(0 <= token < 2**31, f"logit_bias names token {token}; ids are from 0 on, and below 2**31")
            check(-100 <= bias <= 100, f"logit_bias of token {token} is {bias}; it must be from -100 to 100")


@dataclass(frozen=True)
class SamplingFlags:
    """How the next token is sampled; settings that are not given are the model's own (generation_config.json).

    Without those, `generate` takes the most probable token, and `chat` uses temperature 0.6 and top_p 0.9.
    """

    repetition_penalty: float | None = None
    """Divides the positive logits of tokens in prompt and answer, and multiplies the negative ones; 1 does nothing."""
    temperature: float | None = None
    """Divides the logits: below 1 sharper, above 1 flatter; 0 always takes the most probable token."""
    top_k: int | None = None
    """Choose among this many most probable tokens; 0 means all."""
    top_p: float | None = None
    """Choose among the fewest most probable tokens that together have this probability; 1 means all."""
    min_p: float | None = None
    """Drop tokens less probable than this share of the most probable one's probability; 0 drops none."""
    seed: int | None = None
    """The same seed gives the same text; none draws a new one each time."""
    presence_penalty: float | None = None
    """Taken off the logits of tokens that the answer has already, from -2 to 2; the prompt does not count."""
    frequency_penalty: float | None = None
    """Taken off a token's logit for each time that the answer has it, from -2 to 2; the prompt does not count."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of single token ids, each from -100 to 100: --logit-bias ID BIAS ID BIAS ..."""

    def __post_init__(self) -> None:
        SamplingConfig(**self._given())

    def over(self, own: Mapping[str, Any], otherwise: SamplingConfig, model: str) -> SamplingConfig:
        """The settings to use: what is given here, else the model's `own`, else `otherwise`.

        own: as `checkpoint.beside.sampling_of` gives it. Where it has no temperature, `otherwise` decides whether to
        sample at all, and a greedy choice needs no filters. Raises `ConfigError` for values out of range.
        """
        try:
            return SamplingConfig(**{**vars(otherwise), **own, **self._given()})
        except ConfigError as error:
            raise ConfigError(
                f"{model}: in its own generation settings {error}; correct them, or give a flag"
            ) from error

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class GenerateConfig:
    """One prompt, answered once."""

    model: PathText = ""
    """A directory, a .gguf file, a Hub id, or a built-in name."""
    prompt: str = ""
    """What to answer; empty reads standard input to its end."""
    adapter: PathText = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    system: str = ""
    """System prompt; empty leaves it to the chat template."""
    chat_template: PathText = ""
    """A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file; empty takes the
    adapter's, which it was trained with, else the model's."""
    raw: bool = False
    """Continue the prompt as plain text, without the chat template."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and cache; bf16 is read twice as fast. Weights that are stored quantised are run as they are
    with bf16, and multiplied out with fp32."""
    quantize: Literal["", "int8", "int4"] = ""
    """Round the matrices to the nearest codes, for fewer bytes read per token; the codes are cached, so that only the
    first start takes long. `arriero quantize --calibrate` rounds better."""
    json_schema: PathText = ""
    """File with a JSON schema: the answer is JSON that satisfies it."""
    regex: str = ""
    """A regular expression (Rust's syntax) that the whole answer matches."""
    grammar: PathText = ""
    """File with a grammar that the answer follows: Lark, or llama.cpp's GBNF."""
    choices: tuple[str, ...] = ()
    """Texts of which the answer is one."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)

    def __post_init__(self) -> None:
        settle(self)
        check(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        given = [name for name in ("json_schema", "regex", "grammar", "choices") if getattr(self, name)]
        check(len(given) < 2, f"{' and '.join(given)} are given; an answer follows one of them: drop the others")
        check(
            not (self.raw and self.system),
            "system is given with raw: a plain continuation has no system prompt; drop one",
        )
        check(
            not (self.raw and self.chat_template),
            "chat_template is given with raw: a plain continuation has no template; drop one",
        )


@dataclass(frozen=True)
class BenchConfig:
    """Speed of a model on this machine."""

    model: PathText = ""
    """A directory, a .gguf file, a Hub id, or a built-in name."""
    types: tuple[Literal["bf16", "int8", "int4"], ...] = ("bf16", "int8", "int4")
    """Types of the matrices to measure; int8 and int4 are rounded on the fly, for their speed alone."""
    activation_bits: ActivationBits = 15
    """Of what is multiplied by int8 and int4 matrices; 8 is faster for many tokens at a time, and loses a little."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Answers that are decoded at a time."""
    prefill: int = 512
    """Tokens of the prompt that reading is timed on."""
    new_tokens: int = 48
    """Tokens of each answer that decoding is timed on."""
    rounds: int = 3
    """How often each is measured, in turns; medians are shown."""
    plot: PathText = ""
    """Where to write a plot (.png, .svg, .pdf); empty writes none."""

    def __post_init__(self) -> None:
        settle(self)
        check(bool(self.types), "types is empty; name bf16, int8 or int4")
        check(
            self.activation_bits == 15 or set(self.types) != {"bf16"},
            f"activation_bits is {self.activation_bits}, and types bf16 alone; it is of int8 and int4",
        )
        check(bool(self.batches) and min(self.batches) >= 1, f"batches is {self.batches}; give numbers of at least 1")
        for name in ("prefill", "new_tokens", "rounds"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check(
            not self.plot or self.plot.endswith((".png", ".svg", ".pdf")),
            f"plot is {self.plot}; its name must end in .png, .svg or .pdf",
        )


@dataclass(frozen=True)
class ChatConfig:
    """A conversation in the terminal."""

    model: PathText = ""
    """A directory, a .gguf file, a Hub id, or a built-in name."""
    adapter: PathText = ""
    """Directory of a LoRA adapter laid over the model; empty for none."""
    system: str = ""
    """System prompt; empty leaves it to the chat template."""
    chat_template: PathText = ""
    """A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file; empty takes the
    adapter's, which it was trained with, else the model's."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    context: int = 0
    """Tokens of conversation that the model sees; older turns are dropped. 0 means the model's own, at most 8192."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and cache; bf16 is read twice as fast. Weights that are stored quantised are run as they are
    with bf16, and multiplied out with fp32."""
    quantize: Literal["", "int8", "int4"] = ""
    """Round the matrices to the nearest codes, for fewer bytes read per token; the codes are cached, so that only the
    first start takes long. `arriero quantize --calibrate` rounds better."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)

    def __post_init__(self) -> None:
        settle(self)
        check(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        check(self.context >= 0, f"context is {self.context}; it must be at least 0 (0: the model's own)")
