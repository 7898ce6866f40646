"""`arriero eval`: load, measure, compare, show, save.

One model at a time is in memory, so comparing two needs no more than the larger one. An adapter is merged into its
model first: what is measured is what `arriero merge` writes, and decoding costs nothing more for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from arriero.checkpoint.load import best_device, load
from arriero.checkpoint.source import resolve
from arriero.data.formats import Conversation, parse_records
from arriero.data.shards import ONE_SOURCE
from arriero.errors import ConfigError, DataError
from arriero.eval.config import EvalConfig, NeedleConfig, ObedienceConfig, PassConfig
from arriero.eval.generative import answers
from arriero.eval.perplexity import perplexity
from arriero.eval.results import BY_SOURCE, Results, examples_table, measures_table, refuse_not_finite, save
from arriero.io.files import make_output, read_text
from arriero.io.paths import hint
from arriero.io.records import Record, parse_row, read_records, source_files
from arriero.model.linear import densify
from arriero.model.llama import Llama
from arriero.show.progress import progress
from arriero.show.terminal import output
from arriero.tokenizer.base import Tokenizer, utf8, well_formed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
R = TypeVar("R", bound=Results)
Measurement = Callable[[Llama, Tokenizer, str], Results]


def run_eval(config: EvalConfig, console: Console | None = None) -> Results:
    """Measure `config.model` on `config.data`, print the tables, write the files; returns what was found.

    With `compare_with`, that model is measured first, and the tables and files set the two side by side.
    Raises `ConfigError` for settings that name nothing, `DataError` for files and rows that cannot be used, and, after
    all is written, `CheckpointError` for a model whose outputs are not finite.
    """
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ConfigError(f"eval: no {name} given; run: arriero eval MODEL --data FILE")
    console = console or output()
    if config.out:
        make_output(Path(config.out))
    measure = _measurement(config)  # reads the data: a bad file is refused before any model is loaded
    before, after = before_and_after(measure, config)
    console.print(measures_table(before, after, config.resamples, config.seed))
    if after.samples and config.examples:
        console.print(examples_table(before or after, after if before else None, config.examples))
    if config.out:
        save(Path(config.out), asdict(config), before, after)
        samples = ", samples.jsonl" if after.samples else ""
        console.print(f"written: {config.out}/results.json{samples}", markup=False)
    refuse_not_finite(before, after)
    return after


def before_and_after(
    measure: Callable[[Llama, Tokenizer, str], R], config: EvalConfig | NeedleConfig | PassConfig | ObedienceConfig
) -> tuple[R | None, R]:
    """What `measure` finds of the model to compare with, if there is one, and of the model under its adapter."""
    for name in (config.compare_with, config.model, config.adapter):
        if name:
            resolve(name)  # a missing model is refused before the other one has been measured

    chosen = "" if isinstance(config, NeedleConfig) else config.chat_template

    def measured(name: str, adapter: str, quantize: str) -> R:
        dtype, device = DTYPES[config.precision], best_device()
        model, tokenizer = load(
            name, dtype=dtype, device=device, adapter=adapter or None, chat_template=chosen, quantize=quantize
        )
        title = " ".join([name, *([f"in {quantize}"] if quantize else []), *([f"+ {adapter}"] if adapter else [])])
        return measure(densify(model), tokenizer, title)

    before = measured(config.compare_with, "", "") if config.compare_with else None
    return before, measured(config.model, config.adapter, config.quantize)


def tell(config: PassConfig | ObedienceConfig, before: Results | None, after: Results, console: Console) -> None:
    """Print the table and the examples, and write the files where the settings want them."""
    console.print(measures_table(before, after, config.resamples, config.seed))
    if config.examples:
        console.print(examples_table(before or after, after if before else None, config.examples))
    if config.out:
        save(Path(config.out), asdict(config), before, after)
        console.print(f"written: {config.out}/results.json, samples.jsonl", markup=False)


def _measurement(config: EvalConfig) -> Measurement:
    """The function that measures a model by the task that the data calls for."""
    path = Path(config.data)
    if path.suffix == ".txt":
        if config.task == "answers":
            raise ConfigError(f"{path}: a plain text holds no answers; give rows with messages, or task perplexity")
        if not path.is_file():
            raise DataError(f"{path}: no such file; give a .txt file, or rows that `arriero sft` reads{hint(path)}")
        return _on_texts(config, [(ONE_SOURCE, read_text(path))])
    every = (record for file in source_files(config.data) for record in read_records(file))
    records = islice(every, config.rows or None)
    first = next(records)
    task = config.task
    if task == "auto":
        task = "perplexity" if isinstance(parse_row(first).get("text"), str) else "answers"
    if task == "perplexity":
        return _on_texts(config, [_text(record) for record in chain([first], records)])
    return _on_answers(config, list(parse_records(chain([first], records))))


def _on_texts(config: EvalConfig, documents: list[tuple[str, str]]) -> Measurement:
    """Measures texts, each given after the name of its source; where these are several, each by itself too."""
    if config.chat_template:
        raise ConfigError(f"{config.data}: texts are measured as they are; leave --chat-template out")
    sources, texts = zip(*documents, strict=True)
    total = sum(len(utf8(text)) for text in texts)

    def measure(model: Llama, tokenizer: Tokenizer, name: str) -> Results:
        began = time.monotonic()
        with progress(f"measuring {name}", total) as bar:
            found = perplexity(
                model, tokenizer, texts, window=config.window, context=config.context, on_bytes=bar.advance
            )
        ratios = {
            "bits_per_token": found.bits_per_token,
            "bits_per_byte": found.bits_per_byte,
            "perplexity": found.perplexity,
        }
        by_source = found.bits_per_byte_by(sources)
        if len(by_source) > 1:
            ratios |= {BY_SOURCE + source: ratio for source, ratio in by_source.items()}
        return Results(name, ratios, [], found.documents, time.monotonic() - began)

    return measure


def _on_answers(config: EvalConfig, conversations: list[Conversation]) -> Measurement:
    def measure(model: Llama, tokenizer: Tokenizer, name: str) -> Results:
        with progress(f"measuring {name}", 2 * len(conversations)) as bar:
            return answers(
                model,
                tokenizer,
                conversations,
                name=name,
                max_new_tokens=config.max_new_tokens,
                batch=config.batch,
                on_rows=bar.advance,
            )

    return measure


def _text(record: Record) -> tuple[str, str]:
    """The name of a row's source, as `arriero shard --by-source` takes it, and its text."""
    row = parse_row(record)
    text, source = row.get("text"), row.get("source")
    if not isinstance(text, str):
        raise DataError(
            f"row {record.row} of {record.file}: no text in a column 'text'; perplexity needs one in every row"
        )
    if isinstance(source, bytes):
        source = source.decode("utf-8", "replace")
    return well_formed("" if source is None else str(source)) or ONE_SOURCE, text
