"""Evaluates a model on prompts whose answers a scorer judges: `arriero eval pass-at-k`.

Each prompt is answered once greedily and n times by sampling, with random numbers that are the same for every model, so
two models are compared on the same draws. Reported are the greedy answer's reward, the mean reward, pass@1 and
pass@n, without bias (pass_at_k.py; right is full score), and how many answers end by themselves.
Price: n + 1 answers a prompt; the prompt is computed once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console

from arriero.checkpoint.load import load_tokenizer_at
from arriero.checkpoint.source import resolve
from arriero.data.prompts import Prompt, read_prompts
from arriero.errors import ConfigError
from arriero.eval.bootstrap import mean
from arriero.eval.config import PassConfig
from arriero.eval.pass_at_k import is_right, pass_at_k
from arriero.eval.results import PASS_AT, Results, Sample
from arriero.eval.run import before_and_after, tell
from arriero.infer.config import SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Completion, Request
from arriero.io.files import make_output
from arriero.model.llama import Llama
from arriero.rewards.base import Answer, Score, Scorer
from arriero.rewards.open import open_scorer
from arriero.show.progress import progress
from arriero.show.terminal import notes, output
from arriero.tokenizer.base import Tokenizer

GREEDY = SamplingConfig(temperature=0.0)


def run_verified(config: PassConfig, console: Console | None = None) -> Results:
    """Measure `config.model` (after `compare_with`, where given), print the table, write the files.

    Raises a `UserError` for settings that name nothing, and rows that cannot be asked or scored.
    """
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ConfigError(f"eval pass-at-k: no {name} given; run: arriero eval pass-at-k MODEL --data FILE")
    console = console or output()
    if config.out:
        make_output(Path(config.out))
    with open_scorer(config.reward, config.reward_seconds) as scorer:
        _checked(config, scorer)  # before any model is loaded

        def measure(model: Llama, tokenizer: Tokenizer, name: str) -> Results:
            return verified(model, tokenizer, _prompts(config, tokenizer), scorer, config, name)

        before, after = before_and_after(measure, config)
    tell(config, before, after, console)
    return after


def verified(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], scorer: Scorer, config: PassConfig, name: str = ""
) -> Results:
    """Answer all prompts and score the answers."""
    began, n = time.monotonic(), config.answers
    longest = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    engine = Engine(
        model.requires_grad_(False), tokenizer, max_running=config.at_once, step_tokens=max(256, config.at_once),
        context=min(longest, model.config.max_context),
    )  # fmt: skip
    judged = answered(
        engine, prompts, scorer, n, temperature=config.temperature, max_new_tokens=config.max_new_tokens,
        seed=config.seed, title=f"measuring {name}",
    )  # fmt: skip
    samples = []
    for prompt, (answers, scores) in zip(prompts, judged, strict=True):
        values = [score.value for score in scores]
        right = sum(map(is_right, values[1:]))
        passed = {f"{PASS_AT}{k}": pass_at_k(n, right, k) for k in sorted({1, n})}
        stopped = fmean(answer.stopped for answer in answers[1:])
        told = {"greedy_reward": values[0], "reward": fmean(values[1:]), **passed, "stopped": stopped}
        reference = str(prompt.fields.get("answer", ""))
        samples.append(Sample(prompt.text, reference, answers[0].text, told))
    ratios = {key: mean([sample.scores[key] for sample in samples]) for key in samples[0].scores}
    return Results(name, ratios, samples, len(prompts), time.monotonic() - began)


def answered(
    engine: Engine, prompts: Sequence[Prompt], scorer: Scorer, n: int, *, temperature: float, max_new_tokens: int,
    seed: int, title: str, console: Console | None = None,
) -> list[tuple[list[Completion], list[Score]]]:  # fmt: skip
    """Of each prompt its greedy answer and n sampled ones, with their scores.

    The random numbers are a function of the seed and of what is asked, so every model is measured on the same draws.
    """
    requests = []
    for prompt in prompts:
        drawn = SamplingConfig(temperature=temperature, seed=_seed(seed, prompt))
        requests += [Request(prompt.ids, max_new_tokens, s, k) for s, k in ((GREEDY, 1), (drawn, n))]
    with progress(title, len(prompts) * (n + 1), console) as bar:
        found = engine.generate(requests, on_done=bar.advance)
    groups = [first + others for first, others in zip(found[::2], found[1::2], strict=True)]
    asked = [to_score(prompt, answer) for prompt, answers in zip(prompts, groups, strict=True) for answer in answers]
    scores = iter(scorer(asked))
    return [(answers, [next(scores) for _ in answers]) for answers in groups]


def to_score(prompt: Prompt, answer: Completion) -> Answer:
    """A model's answer as rewards take it, with the row of its prompt."""
    return Answer(prompt.messages, answer.text, answer.stopped, prompt.fields, prompt.where)


def _seed(seed: int, prompt: Prompt) -> int:
    """Where a prompt's random numbers begin: a function of what is asked, whatever else is in the file."""
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "big") + prompt.digest).digest()[:8], "big") >> 2


def _prompts(config: PassConfig, tokenizer: Tokenizer, console: Console | None = None) -> Sequence[Prompt]:
    context = config.max_prompt
    prompts = read_prompts(config.data, tokenizer, max_length=context, raw=config.raw, console=console or notes())
    return prompts[: config.rows or None]  # type: ignore[no-any-return]


def _checked(config: PassConfig, scorer: Scorer) -> None:
    """Raise where rows cannot be asked or scored."""
    tokenizer = load_tokenizer_at(
        resolve(config.model), adapter=config.adapter or None, chat_template=config.chat_template
    )
    for prompt in _prompts(config, tokenizer, Console(quiet=True)):
        scorer.check(prompt.fields, prompt.where)
