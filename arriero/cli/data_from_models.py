"""Commands that make fine-tuning data of a model's own answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from arriero.errors import ConfigError, DataError
from arriero.io.paths import PathText
from arriero.show.terminal import say

Precision = Literal["bf16", "fp32"]


def gatt(
    model: PathText,
    data: PathText,
    out: Path,
    *,
    adapter: PathText | None = None,
    instructions: PathText | None = None,
    most: int = 2,
    obeyed: bool = False,
    tries: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    chat_template: PathText | None = None,
    precision: Precision = "bf16",
    seed: int = 0,
) -> None:
    """Make ghost attention's rows: an instruction in the first turn alone that the answers of all turns obey.

    Example:
        arriero data build gatt my-llama dialogues.jsonl out/gatt.jsonl
        arriero data build gatt my-llama dialogues.jsonl out/gatt.jsonl --instructions mine.jsonl --most 3

    Args:
        model: The model that answers under the instruction, which is joined to every turn.
        data: Dialogues (messages); the user's turns are kept, the answers, if there are any, sampled anew.
        out: File for the rows, which `arriero sft` reads; the last answer alone is trained.
        adapter: Directory of a LoRA adapter laid over the model; none when not given.
        instructions: A file of rows long, short and kind; built-in ones when not given.
        most: Instructions of different kinds that are joined, at most.
        obeyed: End dialogues before an answer that does not obey, where a rule can tell: of the built-in ones.
        tries: Answers sampled at each turn, of which the first that has an end (and obeys) is taken.
        temperature: Of sampling; 0 takes the most probable token.
        max_new_tokens: Longest answer, in tokens; a dialogue ends before one that is cut, and needs two turns.
        chat_template: A template's name or a .jinja file; the model's own when not given.
        precision: Type of weights and cache.
        seed: Decides the instructions and the answers.
    """
    from arriero.data.instructions import BUILT_IN, draw, read_dialogues, read_instructions
    from arriero.train.answering import open_answering
    from arriero.train.ghost_attention import build_gatt

    for name, value in (("most", most), ("tries", tries)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    dialogues = draw(read_dialogues(data), read_instructions(instructions) if instructions else BUILT_IN, most, seed)
    answering = open_answering(
        model, adapter=adapter or "", precision=precision, chat_template=chat_template or "",
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    rows, left_out = build_gatt(dialogues, answering, obeyed, tries)
    nothing = "no dialogue is worth learning ({}); raise --max-new-tokens, or take other instructions"
    _write(out, rows, left_out, nothing, f"{len(rows):,} rows")


def distill(
    model: PathText,
    data: PathText,
    out: Path,
    *,
    preprompt: str = "",
    preprompts: PathText | None = None,
    reward: str = "",
    adapter: PathText | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    max_prompt: int = 1024,
    chat_template: PathText | None = None,
    precision: Precision = "bf16",
    seed: int = 0,
) -> None:
    """Make rows for context distillation: answers given under a preprompt, to prompts without it.

    Example:
        arriero data build distill my-llama prompts.jsonl out/rows.jsonl --preprompt "You are careful and polite."
        arriero data build distill my-llama hard.jsonl rows.jsonl --preprompts risks.json --reward python:safe.py:reward

    Args:
        model: The model that answers.
        data: Prompts (prompt, or messages).
        out: File for the rows, which `arriero sft` reads.
        preprompt: What the model is told before every prompt.
        preprompts: A JSON file of preprompts by the rows' field `category`, in place of `preprompt`.
        reward: Keep a row only where this reward prefers the answer under the preprompt (arriero ls rewards).
        adapter: Directory of a LoRA adapter laid over the model; none when not given.
        temperature: Of sampling; 0 takes the most probable token.
        max_new_tokens: Longest answer, in tokens; one that is cut is left out.
        max_prompt: Longest prompt, in tokens.
        chat_template: A template's name or a .jinja file; the model's own when not given.
        precision: Type of weights and cache.
        seed: Decides the answers.
    """
    from contextlib import nullcontext

    from arriero.data.prompts import read_prompts
    from arriero.io.reading import read_json
    from arriero.rewards.open import open_scorer
    from arriero.train.answering import open_answering
    from arriero.train.context_distillation import build_distill, preprompt_of

    if bool(preprompt) == bool(preprompts):
        raise ConfigError("give one of --preprompt and --preprompts: what the model is told before a prompt")
    told = read_json(Path(preprompts), refusal=ConfigError) if preprompts else {"": preprompt}
    if not all(isinstance(text, str) and text.strip() for text in told.values()):
        raise ConfigError(f"{preprompts}: a preprompt is no text, or empty; write {{category: text}}")
    answering = open_answering(
        model, adapter=adapter or "", precision=precision, chat_template=chat_template or "",
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    prompts = read_prompts(data, answering.tokenizer, max_length=max_prompt)
    with open_scorer(reward) if reward else nullcontext() as scorer:
        for prompt in prompts:
            preprompt_of(prompt, told)
            if scorer is not None:
                scorer.check(prompt.fields, prompt.where)
        rows, left_out = build_distill(prompts, told, answering, scorer)
    nothing = "no answer is worth learning ({}); raise --max-new-tokens, or take another preprompt"
    _write(out, rows, left_out, nothing, f"{len(rows):,} rows")


def scored(
    model: PathText,
    data: PathText,
    out: Path,
    *,
    reward: str = "exact",
    answers: int = 8,
    adapter: PathText | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    max_prompt: int = 1024,
    chat_template: PathText | None = None,
    precision: Precision = "bf16",
    seed: int = 0,
) -> None:
    """Make preference rows: several answers of MODEL to each prompt, with their rewards.

    Example:
        arriero data build scored smollm2-135m out/sums/train.jsonl out/scored.jsonl --reward numeric
        arriero reward smollm2-135m --data out/scored.jsonl
        arriero dpo smollm2-135m --data out/scored.jsonl

    Args:
        model: The model that answers.
        data: Prompts (prompt, or messages), with what the reward needs.
        out: File for the rows (prompt, completions, scores), which `arriero reward` and `arriero dpo` read.
        reward: What the answers are scored by (arriero ls rewards).
        answers: Sampled answers to each prompt; prompts whose answers all have one score are left out.
        adapter: Directory of a LoRA adapter laid over the model; none when not given.
        temperature: Of sampling.
        max_new_tokens: Longest answer, in tokens; one that is cut is left out.
        max_prompt: Longest prompt, in tokens.
        chat_template: A template's name or a .jinja file; the model's own when not given.
        precision: Type of weights and cache.
        seed: Decides the answers.
    """
    from arriero.data.prompts import read_prompts
    from arriero.rewards.open import open_scorer
    from arriero.train.answering import open_answering
    from arriero.train.scored_answers import build_scored

    if answers < 2:
        raise ConfigError(f"answers is {answers}; it must be at least 2, for one to be better")
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0: greedy answers are all the same")
    with open_scorer(reward) as scorer:
        answering = open_answering(
            model, adapter=adapter or "", precision=precision, chat_template=chat_template or "",
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
        prompts = read_prompts(data, answering.tokenizer, max_length=max_prompt)
        for prompt in prompts:
            scorer.check(prompt.fields, prompt.where)
        rows, left_out, mean = build_scored(prompts, answering, scorer, answers)
    nothing = "no prompt has a better and a worse answer ({}); raise --max-new-tokens or --answers"
    _write(out, rows, left_out, nothing, f"{len(rows):,} prompts, mean score {mean:.3f}")


def _write(out: Path, rows: list[dict[str, Any]], left_out: Counter[str], nothing: str, told: str) -> None:
    """Write the rows and say so; `nothing`, with why, is the error where there are none."""
    from arriero.io.files import write_jsonl

    why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    if not rows:
        raise DataError(nothing.format(why))
    write_jsonl(out, rows)
    say(f"{out} written: {told}" + (f"; left out: {why}" if why else ""))
